//! [`KvmVm`] and [`KvmVcpu`]: which of the two ways a guest is run, and the state that goes in and out.

use crate::counts::Counter;
use crate::host::host;
use crate::machine::Machine;
use crate::process::Process;
use crate::regs;
use crate::space::Space;
use crate::vm::{SameAddressSpace, host_error, set_xsave};
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, XsaveArea};
use bivisor_emulator::interp::{Core, Env};
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Kicker, Measured, Vcpu};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};
use kvm_ioctls::VcpuFd;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};

/// What the vCPUs of one guest share: the virtual machine of a process. (A machine's vCPU has its own.)
#[derive(Clone)]
pub struct KvmVm {
    model: Arc<CpuModel>,
    generation: Arc<Generation>,
}

/// The virtual machine in one address space. KVM ties it to that: the child of a fork finds it useless and makes the next one.
#[derive(Default)]
struct Generation {
    made: OnceLock<Result<Arc<Shared>, String>>,
    next: OnceLock<Arc<Generation>>,
}

/// The address space of a process, with the right to it.
pub struct Shared {
    same: SameAddressSpace,
    /// Page tables and idle vCPUs.
    pub space: Mutex<Space>,
}

impl Shared {
    /// Is this still the address space it was made in?
    pub fn usable(&self) -> bool {
        self.same.holds()
    }
}

impl KvmVm {
    /// Offers `model` to its guests.
    ///
    /// # Errors
    /// A sentence: why KVM cannot run anything on this host.
    pub fn new(model: Arc<CpuModel>) -> Result<KvmVm, String> {
        let h = host();
        if h.usable_for_process || h.usable_for_machine {
            Ok(KvmVm { model, generation: Arc::default() })
        } else {
            Err(h.reason.clone())
        }
    }

    /// A virtual CPU in the state after RESET; the virtual machine comes with the first run, when it is known for what.
    pub fn vcpu(&self) -> KvmVcpu {
        KvmVcpu {
            vm: self.clone(),
            cpu: Box::new(CpuState::reset()),
            core: Core::new(Env::new(self.model.clone())),
            kicker: Kicker::default(),
            hardware: Hardware::None,
            reason: None,
            interprets: false,
            irqchip: Some(false),
            assists: 0,
            measures: false,
        }
    }

    /// The virtual machine of this address space.
    pub(crate) fn shared(&self) -> Result<Arc<Shared>, String> {
        let mut generation = &self.generation;
        loop {
            let shared = generation.made.get_or_init(|| {
                let make = || Ok(Shared { same: SameAddressSpace::new()?, space: Mutex::new(Space::new()?) });
                make().map(Arc::new).map_err(|e: io::Error| format!("KVM: no virtual machine: {e}"))
            });
            match shared {
                Ok(s) if !s.usable() => generation = generation.next.get_or_init(Arc::default),
                other => return other.clone(),
            }
        }
    }

    /// The offered CPUID leaves in KVM's form.
    pub(crate) fn cpuid(&self) -> Result<CpuId, String> {
        let entries: Vec<kvm_cpuid_entry2> = self
            .model
            .leaves()
            .into_iter()
            .map(|(function, index, [eax, ebx, ecx, edx])| {
                let indexed = matches!(function, 4 | 7 | 0xb | 0xd | 0x14 | 0x1f | 0x8000_001d);
                let flags = if indexed { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
                kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
            })
            .collect();
        CpuId::from_entries(&entries).map_err(|e| format!("KVM: the CPU's leaves do not fit: {e:?}"))
    }
}

/// What a vCPU runs on.
pub(crate) enum Hardware {
    None,
    Process(Box<Process>),
    Machine(Box<Machine>),
}

/// A virtual CPU on KVM.
///
/// With [`GuestMemory::Flat`] it is a thread of a Linux process: 64-bit code at CPL 3 over the host's address space. With
/// [`GuestMemory::Ram`] it is a machine's processor. After [`Exit::Unsupported`], [`KvmVcpu::reason`] says what cannot be done.
pub struct KvmVcpu {
    pub(crate) vm: KvmVm,
    /// General registers are always here; the rest may be newer in the hardware: see [`Extended`].
    pub(crate) cpu: Box<CpuState>,
    /// The interpreter for single instructions.
    pub(crate) core: Core,
    pub(crate) kicker: Kicker,
    pub(crate) hardware: Hardware,
    pub(crate) reason: Option<String>,
    /// See [`KvmVcpu::interpreting`].
    pub(crate) interprets: bool,
    /// See [`KvmVcpu::with_irqchip`].
    pub(crate) irqchip: Option<bool>,
    assists: u64,
    /// Is what leaving costs to be measured?
    pub(crate) measures: bool,
}

impl KvmVcpu {
    /// A machine's processor for which the interpreter runs what a software KVM has not: 32-bit and PAE paging, virtual-8086 and
    /// compatibility mode, 57-bit addresses, process-context identifiers. Otherwise these are [`Exit::Unsupported`].
    pub fn interpreting(mut self) -> KvmVcpu {
        self.interprets = true;
        self
    }

    /// Are a machine's interrupt controllers those of the kernel, where HLT waits then too, or the bus's, as they are without this? `None`: the
    /// kernel's, but for a software KVM.
    pub fn with_irqchip(mut self, in_kernel: Option<bool>) -> KvmVcpu {
        self.irqchip = in_kernel;
        self
    }

    /// Why the last [`Exit::Unsupported`].
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Why and how often the guest of a machine was left, by KVM's counters too where it has some (Linux 5.14); empty before the
    /// first run.
    pub fn counts(&self) -> Vec<(Counter, u64)> {
        match &self.hardware {
            Hardware::Machine(m) => m.counts(),
            _ => Vec::new(),
        }
    }

    /// How often the interpreter did an instruction of the guest's.
    pub fn assists(&self) -> u64 {
        self.assists
    }

    /// Remembers why, for [`Exit::Unsupported`].
    pub(crate) fn unsupported(&mut self, reason: impl Into<String>) -> Exit {
        self.reason = Some(reason.into());
        Exit::Unsupported
    }

    /// One instruction by the interpreter, on a complete state.
    pub(crate) fn assist(&mut self, board: Board<'_>) -> Exit {
        self.assists += 1;
        self.core.mmu.flush();
        self.core.step(&mut self.cpu, board)
    }

    /// Can the hardware not leave the guest where it is told to? Then it goes one instruction at a time.
    pub(crate) fn must_step(&self) -> bool {
        let by_hand = Intercepts::CPUID | Intercepts::RDTSC | Intercepts::RDRAND;
        self.core.intercepts.intersects(by_hand)
    }
}

impl Vcpu for KvmVcpu {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        self.reason = None;
        match board.mem {
            GuestMemory::Flat(flat) => self.run_process(board, flat, budget),
            GuestMemory::Ram(ram) => self.run_machine(board, ram, budget),
        }
    }

    fn state(&mut self) -> &mut CpuState {
        let fetched = match &mut self.hardware {
            Hardware::None => Ok(()),
            Hardware::Process(p) => p.fetch(&mut self.cpu),
            Hardware::Machine(m) => m.fetch(&mut self.cpu),
        };
        if let Err(e) = fetched {
            self.reason = Some(format!("KVM: the state cannot be read: {e}"));
        }
        &mut self.cpu
    }

    fn integer_state(&mut self) -> &mut CpuState {
        &mut self.cpu
    }

    fn around_fork(&mut self, fork: &mut dyn FnMut()) {
        // The child cannot ask this hardware any more.
        self.state();
        fork();
    }

    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.core.intercepts = intercepts;
    }

    fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    fn measure(&mut self) {
        self.measures = true;
    }

    fn measured(&self) -> Measured {
        // Of the TLB only the processor knows; KVM counts the page faults that it handled itself.
        let costs = if let Hardware::Machine(m) = &self.hardware { m.watch.costs() } else { Vec::new() };
        Measured { costs, ..Measured::default() }
    }
}

/// The extended state (x87 to AVX-512): fetched when somebody asks, loaded when it was changed.
#[derive(Default)]
pub(crate) enum Extended {
    /// Never loaded.
    #[default]
    Unknown,
    /// The hardware has what matters.
    InHardware,
    /// The hardware has this; [`CpuState`] has what matters.
    Fetched(Box<XsaveArea>),
}

impl Extended {
    /// Makes `cpu.xsave` what matters.
    pub fn fetch(&mut self, vcpu: &VcpuFd, cpu: &mut CpuState) -> io::Result<()> {
        if let Extended::InHardware = self {
            regs::take_xsave(&mut cpu.xsave, &vcpu.get_xsave().map_err(host_error)?);
            *self = Extended::Fetched(Box::new(cpu.xsave.clone()));
        }
        Ok(())
    }

    /// Makes the hardware have what matters.
    pub fn load(&mut self, vcpu: &VcpuFd, cpu: &CpuState) -> io::Result<()> {
        let same = match self {
            Extended::InHardware => true,
            Extended::Fetched(held) => held.bytes == cpu.xsave.bytes,
            Extended::Unknown => false,
        };
        if !same {
            set_xsave(vcpu, &regs::xsave(&cpu.xsave))?;
        }
        *self = Extended::InHardware;
        Ok(())
    }
}
