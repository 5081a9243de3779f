//! What this host's KVM is and can do, by evidence: a small guest is run and what happens is compared with what hardware does.
//!
//! /dev/kvm may be VT-x or AMD-V, the same inside another virtual machine, or a software module (such as PVM) that runs 64-bit user
//! code natively and interprets everything else a thousand times slower. Names and CPUID say little about that; a loop at CPL 0 does.

use crate::regs;
use crate::vm::{Vm, host_error};
use bivisor_emulator::cpu::{CpuState, Cr4, Rflags, Segment, Table};
use bivisor_emulator::isa::{Gpr, Seg};
use kvm_bindings::{CpuId, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::io;
use std::sync::OnceLock;
use std::time::Instant;

/// What answers behind /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// There is no /dev/kvm.
    Absent,
    /// There is one, but this user may not open it.
    Forbidden,
    /// It opens, but a minimal guest does not run.
    Broken,
    /// Intel VT-x.
    VtX,
    /// AMD-V.
    Svm,
    /// No hardware virtualization: user code runs natively under shadow page tables, the rest is interpreted in the kernel.
    Software,
}

/// What the probe found.
#[derive(Clone, Debug)]
pub struct HostKvm {
    /// What answers.
    pub kind: Kind,
    /// The host is itself a virtual machine: an exit goes through its hypervisor.
    pub nested: bool,
    /// What the verdict rests on, one observation each.
    pub evidence: Vec<String>,
    /// 64-bit user code runs natively and SYSCALL can be caught: a Linux process can run.
    pub usable_for_process: bool,
    /// Every mode runs at hardware speed: a machine with its own kernel can run.
    pub usable_for_machine: bool,
    /// Worth choosing without being asked: hardware virtualization only.
    pub pays_off: bool,
    /// One sentence why it is chosen or not.
    pub reason: String,
    /// SYSCALL at CPL 3 goes to LSTAR but stays at CPL 3.
    pub syscall_stays_at_cpl3: bool,
    /// INT n at CPL 3 gives #UD, whatever the gate says.
    pub int_n_is_ud: bool,
    /// Nanoseconds from the guest to the monitor and back.
    pub exit_ns: u64,
}

impl HostKvm {
    fn verdict(kind: Kind, reason: impl Into<String>, evidence: Vec<String>) -> HostKvm {
        HostKvm {
            kind,
            nested: false,
            evidence,
            usable_for_process: false,
            usable_for_machine: false,
            pays_off: false,
            reason: reason.into(),
            syscall_stays_at_cpl3: false,
            int_n_is_ud: false,
            exit_ns: 0,
        }
    }
}

/// The probe of this host, done once (a few milliseconds).
pub fn host() -> &'static HostKvm {
    static HOST: OnceLock<HostKvm> = OnceLock::new();
    HOST.get_or_init(probe)
}

fn probe() -> HostKvm {
    let open = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match open {
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
            let reason = "/dev/kvm exists, but this user may not open it (is the user in the group kvm?)";
            return HostKvm::verdict(Kind::Forbidden, reason, vec![format!("open: {e}")]);
        }
        Err(e) => {
            let reason =
                "there is no /dev/kvm: the kernel module is not loaded or the machine does not offer virtualization";
            return HostKvm::verdict(Kind::Absent, reason, vec![format!("open: {e}")]);
        }
    }
    match experiment() {
        Ok(seen) => judge(&seen),
        Err(e) => HostKvm::verdict(
            Kind::Broken,
            format!("/dev/kvm opens, but a minimal guest does not run: {e}"),
            vec![format!("experiment: {e}")],
        ),
    }
}

/// What the experiment measured.
struct Seen {
    /// Nanoseconds for one turn of a two-instruction loop.
    cpl3_ns: f64,
    cpl0_ns: f64,
    exit_ns: u64,
    /// CPL in the LSTAR stub.
    syscall_cpl: Option<u8>,
    /// The vector that INT 0x21 at CPL 3 arrived at.
    int_vector: Option<u8>,
}

fn judge(seen: &Seen) -> HostKvm {
    let leaf1 = __cpuid(1);
    let vmx = leaf1.ecx & (1 << 5) != 0;
    let svm = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx & (1 << 2) != 0;
    let nested = leaf1.ecx & (1 << 31) != 0;
    let modules = ["kvm_intel", "kvm_amd", "kvm_pvm"]
        .into_iter()
        .filter(|m| std::path::Path::new("/sys/module").join(m).exists())
        .collect::<Vec<_>>();
    // In hardware both loops take the same time; interpreting takes hundreds of times longer. The factor leaves room for a busy host.
    let emulated = seen.cpl0_ns > 40.0 * seen.cpl3_ns && seen.cpl0_ns > 50.0;
    let catches_syscall = seen.syscall_cpl.is_some();
    let mut evidence = vec![
        format!("a loop at CPL 3 takes {:.1} ns a turn, at CPL 0 {:.1} ns", seen.cpl3_ns, seen.cpl0_ns),
        format!("an exit to the monitor and back takes {:.1} us", seen.exit_ns as f64 / 1000.0),
        match seen.syscall_cpl {
            Some(0) => "SYSCALL at CPL 3 arrives at LSTAR at CPL 0, as in hardware".into(),
            Some(cpl) => format!("SYSCALL at CPL 3 arrives at LSTAR at CPL {cpl}: not what hardware does"),
            None => "SYSCALL at CPL 3 does not arrive at LSTAR".into(),
        },
        match seen.int_vector {
            Some(0x21) => "INT 0x21 at CPL 3 arrives at gate 0x21, as in hardware".into(),
            Some(v) => format!("INT 0x21 at CPL 3 arrives at vector {v}: not what hardware does"),
            None => "INT 0x21 at CPL 3 arrives nowhere".into(),
        },
        format!("CPUID of the host: VMX {}, SVM {}, hypervisor {}", yes(vmx), yes(svm), yes(nested)),
    ];
    if !modules.is_empty() {
        evidence.push(format!("kernel modules: {}", modules.join(", ")));
    }
    let hardware = !emulated && seen.syscall_cpl == Some(0);
    let kind = match (hardware, vmx, svm) {
        (false, ..) => Kind::Software,
        (true, _, true) => Kind::Svm,
        (true, true, false) => Kind::VtX,
        // Runs like hardware though CPUID hides it: go by the vendor.
        (true, false, false) if __cpuid(0).ebx == u32::from_le_bytes(*b"Auth") => Kind::Svm,
        (true, false, false) => Kind::VtX,
    };
    let exit_us = seen.exit_ns as f64 / 1000.0;
    let reason = match kind {
        Kind::Software => format!(
            "KVM here is a software module: 64-bit user code runs natively, but an exit costs {exit_us:.0} us and kernel code is \
             interpreted {:.0} times slower than native",
            seen.cpl0_ns / seen.cpl3_ns.max(0.1)
        ),
        _ if nested => {
            format!("KVM is hardware virtualization inside another virtual machine: an exit costs {exit_us:.1} us")
        }
        _ => format!("KVM is hardware virtualization: an exit costs {exit_us:.1} us"),
    };
    HostKvm {
        kind,
        nested,
        evidence,
        usable_for_process: catches_syscall,
        usable_for_machine: hardware,
        pays_off: hardware,
        reason,
        syscall_stays_at_cpl3: seen.syscall_cpl == Some(3),
        int_n_is_ud: seen.int_vector == Some(6),
        exit_ns: seen.exit_ns,
    }
}

fn yes(b: bool) -> &'static str {
    if b { "yes" } else { "no" }
}

/// The host's own CPUID leaves without those of its hypervisor: what a guest of the probe is offered. (A software KVM hides most of
/// them from KVM_GET_SUPPORTED_CPUID, but takes them.)
pub fn host_cpuid() -> io::Result<CpuId> {
    let mut entries = Vec::new();
    for base in [0u32, 0x8000_0000] {
        let last = __cpuid(base).eax;
        for function in (base..=last).take(64) {
            let indexed = matches!(function, 4 | 7 | 0xb | 0xd | 0x8000_001d);
            for index in 0..if indexed { 64 } else { 1 } {
                let l = __cpuid_count(function, index);
                let empty = l.eax | l.ebx | l.ecx | l.edx == 0;
                if index > 1 && empty && function != 0xd || index > 2 && function == 0xb || entries.len() >= 200 {
                    break;
                }
                if index == 0 || !empty {
                    let flags = u32::from(indexed);
                    let (eax, ebx, ecx, edx) = (l.eax, l.ebx, l.ecx, l.edx);
                    entries.push(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] });
                }
            }
        }
    }
    CpuId::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))
}

// Guest-physical = guest-linear layout of the probe's guest.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
pub(crate) const GDT: u64 = 0x4000;
pub(crate) const IDT: u64 = 0x5000;
const TSS: u64 = 0x6000;
/// Selectors unlike those of any host: what shows others is not virtualized.
pub(crate) const TR: u16 = 0x48;
pub(crate) const CS3: u16 = 0x53;
pub(crate) const FS3: u16 = 0x1b;
pub(crate) const STACK0: u64 = 0x8000;
const STUBS: u64 = 0x9000;
const LSTAR: u64 = 0xb000;
const CODE: u64 = 0xc000;
pub(crate) const STACK3: u64 = 0xf000;
/// Mapped, but no memory there: a store leaves the guest.
const HOLE: u64 = 0x20_0000;

/// A guest of one vCPU: identity-mapped memory that everybody may use, an IDT whose stubs leave, a stub at LSTAR that leaves.
pub(crate) struct Sandbox {
    vm: Vm,
    memory: usize,
    guest: Guest,
}

impl Sandbox {
    pub fn new() -> io::Result<Sandbox> {
        let mut vm = Vm::new()?;
        let memory = vm.map_new(0, 0x1_0000)?;
        let pages = vm.pages(memory);
        pages.store(PML4, PDPT | 7);
        pages.store(PDPT, PD | 7);
        pages.store(PD, 0xe7);
        pages.store(PD + 8, HOLE | 0xe7);
        for (slot, v) in [(2, 0x00af_9b00_0000_ffffu64), (3, 0x00cf_9300_0000_ffff)] {
            pages.store(GDT + 8 * slot, v);
        }
        // RSP0 lies at offset 4 of the TSS.
        pages.write(TSS + 4, &STACK0.to_le_bytes());
        for vector in 0..256 {
            let stub = STUBS + 16 * vector;
            pages.write(stub, &[0xe6, 0x10]);
            // A 64-bit interrupt gate, DPL 3, to selector 0x10.
            pages.store(IDT + 16 * vector, stub & 0xffff | 0x10 << 16 | 0xee00 << 32 | (stub >> 16) << 48);
        }
        // mov [HOLE], al; jmp rcx
        let mut stub = vec![0xa2];
        stub.extend(HOLE.to_le_bytes());
        stub.extend([0xff, 0xe1]);
        pages.write(LSTAR, &stub);
        let mut guest = Guest { vcpu: vm.vcpu(0)?, umip: false, strange: false, rflags: Rflags::FIXED | Rflags::IF };
        guest.vcpu.set_cpuid2(&host_cpuid()?).map_err(host_error)?;
        let star = [(0xc000_0081u32, 0x0023_0010_0000_0000u64), (0xc000_0082, LSTAR), (0xc000_0084, 0x47700)];
        let entries = star.map(|(index, data)| kvm_msr_entry { index, data, reserved: 0 });
        let msrs = kvm_bindings::Msrs::from_entries(&entries).expect("three entries fit");
        guest.vcpu.set_msrs(&msrs).map_err(host_error)?;
        guest.vcpu.set_sync_valid_reg(SyncReg::Register);
        guest.vcpu.set_sync_valid_reg(SyncReg::SystemRegister);
        Ok(Sandbox { vm, memory, guest })
    }

    /// Puts code to where the guest starts.
    pub fn write(&self, code: &[u8]) {
        self.vm.pages(self.memory).write(CODE, code);
    }

    /// Runs it with RCX as given until it leaves.
    pub fn run(&mut self, cpl: u8, rcx: u64) -> io::Result<Left> {
        self.guest.start(cpl, rcx)?;
        self.guest.run()
    }

    /// As [`Sandbox::run`], with selectors that no host has, these flags, and perhaps CR4.UMIP.
    pub fn run_strange(&mut self, cpl: u8, rflags: Rflags, umip: bool) -> io::Result<Left> {
        let usual = self.guest.rflags;
        (self.guest.umip, self.guest.strange, self.guest.rflags) = (umip, true, rflags);
        let left = self.run(cpl, 0);
        (self.guest.umip, self.guest.strange, self.guest.rflags) = (false, false, usual);
        left
    }

    /// The general registers, in KVM's words.
    pub fn registers(&mut self) -> kvm_bindings::kvm_regs {
        self.guest.vcpu.sync_regs_mut().regs
    }
}

/// Ends code: a store that leaves the guest.
pub(crate) fn leave() -> Vec<u8> {
    let mut code = vec![0xa2];
    code.extend(HOLE.to_le_bytes());
    code
}

fn experiment() -> io::Result<Seen> {
    let mut sandbox = Sandbox::new()?;
    // dec rcx; jnz; mov [HOLE], al; jmp to itself
    let mut code = vec![0x48, 0xff, 0xc9, 0x75, 0xfb, 0xa2];
    code.extend(HOLE.to_le_bytes());
    code.extend([0xeb, 0xf5]);
    sandbox.write(&code);
    let guest = &mut sandbox.guest;
    let mut turn = |cpl: u8, turns: u64, times: usize| -> io::Result<f64> {
        let mut best = f64::MAX;
        for _ in 0..times {
            guest.start(cpl, turns)?;
            let start = Instant::now();
            if guest.run()? != Left::Mmio {
                return Err(io::Error::other(format!("a loop at CPL {cpl} did not end as it should")));
            }
            best = best.min(start.elapsed().as_nanos() as f64);
        }
        Ok(best)
    };
    // The cost of getting in and out, to be taken off both.
    let exit3 = turn(3, 1, 5)?;
    let cpl3_ns = (turn(3, 200_000, 2)? - exit3).max(0.0) / 200_000.0;
    let exit0 = turn(0, 1, 4)?;
    let cpl0_ns = (turn(0, 200, 2)? - exit0).max(0.0) / 200.0;

    sandbox.write(&[0x0f, 0x05]);
    let syscall_cpl = (sandbox.run(3, 0)? == Left::Mmio).then(|| sandbox.guest.cpl());
    sandbox.write(&[0xcd, 0x21]);
    let int_vector = match sandbox.run(3, 0)? {
        Left::Vector(v) => Some(v),
        _ => None,
    };
    Ok(Seen { cpl3_ns, cpl0_ns, exit_ns: exit3 as u64, syscall_cpl, int_vector })
}

struct Guest {
    vcpu: VcpuFd,
    umip: bool,
    /// Selectors that no host has.
    strange: bool,
    rflags: Rflags,
}

/// How the sandbox's guest left.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Left {
    Mmio,
    Vector(u8),
    /// KVM cannot emulate the instruction.
    NotEmulated,
    Other(String),
}

impl Guest {
    fn start(&mut self, cpl: u8, rcx: u64) -> io::Result<()> {
        let mut cpu = CpuState::long64(cpl);
        cpu.cr3 = PML4;
        if self.umip {
            cpu.cr4 |= Cr4::UMIP;
        }
        cpu.gdtr = Table { base: GDT, limit: 0x1f };
        cpu.idtr = Table { base: IDT, limit: 0xfff };
        cpu.tr =
            Segment { base: TSS, limit: 0x67, attr: bivisor_emulator::cpu::Attr::from_bits_retain(0x8b), selector: TR };
        if cpl == 3 {
            // Null data segments and a usable SS, as on Linux.
            cpu.seg[Seg::Ss as usize] = Segment::data32(0x2b, 3);
            if self.strange {
                cpu.seg[Seg::Cs as usize].selector = CS3;
                cpu.seg[Seg::Ss as usize].selector = CS3 + 8;
                cpu.seg[Seg::Fs as usize] = Segment::data32(FS3, 3);
            }
        }
        cpu.rip = CODE;
        cpu.gpr[Gpr::Rsp as usize] = STACK3;
        cpu.gpr[Gpr::Rcx as usize] = rcx;
        cpu.rflags = self.rflags;
        self.vcpu.set_sregs(&regs::sregs(&cpu, &Default::default())).map_err(host_error)?;
        self.vcpu.set_regs(&regs::regs(&cpu)).map_err(host_error)
    }

    fn run(&mut self) -> io::Result<Left> {
        loop {
            return match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(HOLE, _)) => Ok(Left::Mmio),
                Ok(VcpuExit::IoOut(0x10, _)) => {
                    let rip = self.vcpu.sync_regs_mut().regs.rip;
                    Ok(Left::Vector((rip.wrapping_sub(STUBS) / 16) as u8))
                }
                Ok(VcpuExit::InternalError) => Ok(Left::NotEmulated),
                Ok(other) => Ok(Left::Other(format!("{other:?}"))),
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => continue,
                Err(e) => Err(host_error(e)),
            };
        }
    }

    fn cpl(&mut self) -> u8 {
        self.vcpu.sync_regs_mut().sregs.ss.dpl
    }
}
