//! The engines under test in a campaign: each on its memory, driven through the contract, SYSCALL and exceptions intercepted.

use super::arena::{self, BREAK, EXIT, NOTE, STUB, TABLES, View};
use super::case::Case;
use super::outcome::{End, NORMAL, Outcome};
use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Fault, Rflags, Table};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::interp::sensitive::time::TimeSource;
use bivisor_emulator::isa::{Gpr, Seg};
use bivisor_emulator::mem::{GuestMemory, Prot};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_kvm_backend::KvmVm;
use bivisor_translator::Translator;
use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

/// An engine of a campaign.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Which {
    /// The interpreter on a process's memory.
    Interp,
    /// The translator on a process's memory: the flat model.
    Bt,
    /// KVM on a process's memory, CPL 3.
    Kvm,
    /// The interpreter behind page tables.
    InterpPaged,
    /// The translator behind page tables: the checked model.
    BtPaged,
}

impl Which {
    /// All of them.
    pub const ALL: [Which; 5] = [Which::Interp, Which::Bt, Which::Kvm, Which::InterpPaged, Which::BtPaged];

    /// As options and reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Which::Interp => "interp",
            Which::Bt => "bt",
            Which::Kvm => "kvm",
            Which::InterpPaged => "interp-paged",
            Which::BtPaged => "bt-paged",
        }
    }

    /// By name.
    pub fn named(name: &str) -> Option<Which> {
        Which::ALL.into_iter().find(|w| w.name() == name)
    }
}

/// Changes what an engine left behind: a bug planted by a test.
pub type Planted = Box<dyn FnMut(&Case, &mut CpuState)>;

/// An engine with its memory.
pub struct Engine {
    /// Which.
    pub which: Which,
    vcpu: Box<dyn Vcpu>,
    /// The arena as it sees it.
    pub view: View,
    mem: GuestMemory,
    template: CpuState,
    planted: Option<Planted>,
}

/// More than any case needs: whoever runs longer hangs.
const BUDGET: u64 = 20_000;

impl Engine {
    /// Makes an engine.
    ///
    /// # Errors
    /// A sentence: it is not to be had here.
    pub fn new(which: Which) -> Result<Engine, String> {
        let model = Arc::new(CpuModel::host());
        let translator = || Translator::new(model.clone()).map_err(|e| format!("no executable memory: {e}"));
        let mut vcpu: Box<dyn Vcpu> = match which {
            Which::Interp | Which::InterpPaged => Box::<Interpreter>::default(),
            Which::Bt => Box::new(translator()?),
            Which::BtPaged => {
                let mut translator = translator()?;
                translator.set_mirror_after(Some(Duration::ZERO));
                Box::new(translator)
            }
            Which::Kvm => {
                let host = bivisor_kvm_backend::host();
                if !host.usable_for_process {
                    return Err(host.reason.clone());
                }
                Box::new(KvmVm::new(model.clone())?.vcpu())
            }
        };
        let (view, mem) = match which {
            Which::InterpPaged | Which::BtPaged => arena::ram()?,
            _ => arena::flat()?,
        };
        vcpu.set_intercepts(Intercepts::EXCEPTIONS | Intercepts::SYSCALL);
        let mut template = CpuState::long64(3);
        template.cr3 = TABLES;
        // No I/O permission map: ports are closed.
        template.tr.limit = 0;
        template.gdtr = Table { base: arena::GDT, limit: arena::GDT_LIMIT };
        // No LDT.
        template.ldtr.limit = 0;
        // No gate: INT n is #GP, as through a gate that is the kernel's.
        template.idtr.limit = 0;
        *vcpu.state() = template.clone();
        Ok(Engine { which, vcpu, view, mem, template, planted: None })
    }

    /// Plants a bug.
    pub fn plant(&mut self, planted: Planted) {
        self.planted = Some(planted);
    }

    /// Gives it a page of code that can store into itself.
    pub fn map_own(&mut self) {
        arena::map_own(&self.mem);
    }

    /// That page was changed from outside.
    pub fn own_changed(&mut self) {
        let page = arena::OWN..arena::OWN + 0x1000;
        match self.mem.flat() {
            Some(flat) => {
                flat.protect(page, Prot::READ | Prot::WRITE | Prot::EXEC);
                arena::renew_own(false);
            }
            None => self.code_changed(page),
        }
    }

    /// The code in memory was changed from outside.
    pub fn code_changed(&mut self, range: std::ops::Range<u64>) {
        match (self.mem.flat(), self.mem.ram()) {
            (Some(flat), _) => flat.protect(range, Prot::READ | Prot::EXEC),
            (_, Some(ram)) => range.step_by(0x1000).for_each(|page| ram.wrote(page - arena::BASE)),
            _ => {}
        }
    }

    /// Runs a case whose memory is set up.
    ///
    /// # Errors
    /// The engine left in a way that no instruction of a case can cause.
    pub fn run(&mut self, case: &Case, out: &mut Outcome) -> Result<(), String> {
        // Hardware's SYSCALL takes RCX and R11.
        let stub = if self.which == Which::Kvm { BREAK } else { STUB };
        self.view.write(EXIT, &stub.to_le_bytes());
        self.view.write(NOTE, &[0; 4]);
        let s = self.vcpu.state();
        s.gpr = case.gpr;
        s.rip = case.rip;
        s.rflags = Rflags::from_bits_retain(case.rflags);
        s.seg[Seg::Fs as usize].base = case.fs_base;
        s.xsave.bytes.copy_from_slice(&case.xsave.bytes);
        s.cr2 = 0;
        let budget = if self.which == Which::Interp || self.which == Which::InterpPaged { BUDGET } else { u64::MAX };
        let exit = self.vcpu.run(Board { mem: &self.mem, bus: &EmptyBus }, budget);
        if let Some(planted) = &mut self.planted {
            planted(case, self.vcpu.state());
        }
        let s = self.vcpu.state();
        out.gpr = s.gpr;
        out.rflags = s.rflags.bits();
        out.fs_base = s.seg[Seg::Fs as usize].base;
        out.xsave.bytes.copy_from_slice(&s.xsave.bytes);
        out.selectors = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs].map(|g| s.seg[g as usize].selector);
        out.other.clear();
        (out.end, out.rip) = match exit {
            Exit::Intercept { what: Intercepts::SYSCALL, .. } if s.rip == STUB => {
                (End::Left, u64::from(self.view.load32(NOTE)))
            }
            Exit::Exception(Fault::Bp) if s.rip == BREAK + 1 => (End::Left, u64::from(self.view.load32(NOTE))),
            Exit::Exception(fault) => (End::Fault(fault), s.rip),
            other => {
                let why = format!("{} left with {other:?} at {:#x}", self.which.name(), s.rip);
                *s = self.template.clone();
                return Err(why);
            }
        };
        others(&mut self.template, s, out);
        Ok(())
    }
}

/// What else changed; puts it back.
fn others(template: &mut CpuState, s: &mut CpuState, out: &mut Outcome) {
    let fs = s.seg[Seg::Fs as usize].base;
    template.seg[Seg::Fs as usize].base = fs;
    let system = |s: &CpuState| (s.cr0, s.cr3, s.cr4, s.cr8, s.xcr0, s.efer, s.dr, s.dr6, s.dr7, s.activity);
    let loaded = out.selectors != NORMAL;
    if s.seg != template.seg && !loaded {
        out.other = format!("segments {:x?}", s.seg);
    } else if system(s) != system(template) || s.interrupt_shadow || s.ldtr != template.ldtr || s.tr != template.tr {
        out.other = "system registers or activity".into();
    } else if !loaded {
        return;
    }
    let gpr = s.gpr[Gpr::Rax as usize];
    *s = template.clone();
    s.gpr[Gpr::Rax as usize] = gpr;
}

/// Time that repeats, from its start, for an engine that has a time of its own.
pub fn restart_time(vcpu: &mut dyn Vcpu, seed: u64) {
    let any: &mut dyn Any = vcpu;
    if let Some(interpreter) = any.downcast_mut::<Interpreter>() {
        interpreter.env().time = TimeSource::deterministic(seed);
    } else if let Some(translator) = any.downcast_mut::<Translator>() {
        translator.env().time = TimeSource::deterministic(seed);
    }
}
