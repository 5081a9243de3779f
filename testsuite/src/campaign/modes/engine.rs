//! The engines under test in 16- and 32-bit code: behind page tables, with Linux's global table and the cases' local one; the translator
//! outside IA-32e mode too, where its 32-bit code is another.

use super::segments::{FLAT_CODE, FLAT_DATA, LDT, segment};
use super::system;
use crate::campaign::arena::{self, IDT_AT, TABLES, TSS_AT, View};
use crate::campaign::beside::Runs;
use crate::campaign::case::Case;
use crate::campaign::engine::{Planted, Which, restart_time};
use crate::campaign::outcome::{End, Outcome};
use bivisor_emulator::bus::EmptyBus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{Attr, CpuState, Efer, Rflags, Segment, Table};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::{Class, Seg, Sensitivity, Width, facts};
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_translator::Translator;
use iced_x86::{Code, Mnemonic};
use std::sync::Arc;
use std::time::Duration;

/// Where an engine runs the cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In compatibility mode.
    Compat,
    /// Outside IA-32e mode, behind PAE paging; the translator looks each access up.
    Pae,
    /// There, and accesses go to the mirror.
    PaeMirror,
    /// At CPL 0 outside IA-32e mode, in real mode, in virtual-8086 mode, as the case says: see [`system`].
    System,
}

/// An engine with its memory.
pub struct Engine {
    /// Which.
    pub which: Which,
    place: Place,
    vcpu: Box<dyn Vcpu>,
    /// The arena as it sees it.
    pub view: View,
    mem: GuestMemory,
    template: CpuState,
    /// RAM behind the arena, which only cases of [`Place::System`] can change.
    tables: Vec<u8>,
    planted: Option<Planted>,
}

/// More than any case needs: whoever runs longer hangs.
const BUDGET: u64 = 20_000;
/// ES, CS, SS, DS, FS, as a case names them.
pub const ORDER: [Seg; 5] = [Seg::Es, Seg::Cs, Seg::Ss, Seg::Ds, Seg::Fs];

/// Linear addresses of the two descriptor tables: where no 32-bit code can look, as on Linux.
const GDT: u64 = 0xffff_8000_0000_1000;
const LOCAL: u64 = GDT + 0x1000;
/// The same outside IA-32e mode, where cases hardly look.
const LEGACY_GDT: u64 = 0xff20_0000;
/// The page-directory pointers there.
const POINTERS: u64 = TABLES + 0x7000;

/// Puts the descriptor tables where they belong, and takes the kernel's pages out of the arena.
fn tables(mem: &GuestMemory, place: Place) -> Option<()> {
    const TABLE: u64 = TABLES + 0x7000;
    const WRITABLE: u64 = 0x63;
    let put = |at: u64, v: u64| mem.store(at, Width::Q, v);
    if place != Place::Compat {
        // Pointers have neither rights nor marks (SDM 3A 4.4.2).
        let (directory, table) = (POINTERS + 0x1000, POINTERS + 0x2000);
        put(POINTERS, (TABLES + 0x2000) | 1)?;
        put(POINTERS + 8 * (LEGACY_GDT >> 30), directory | 1)?;
        put(directory + 8 * (LEGACY_GDT >> 21 & 0x1ff), table | WRITABLE)?;
        put(table, (TABLES + 0x4000) | WRITABLE)?;
        put(table + 8, IDT_AT as u64 | WRITABLE)?;
    } else {
        // One page is page-directory pointers, directory and table at once.
        put(TABLES + 8 * (GDT >> 39 & 0x1ff), TABLE | WRITABLE)?;
        put(TABLE, TABLE | WRITABLE)?;
        put(TABLE + 8, (TABLES + 0x4000) | WRITABLE)?;
        put(TABLE + 16, IDT_AT as u64 | WRITABLE)?;
    }
    for page in [arena::GDT, arena::IDT, arena::TSS].into_iter().chain((0..4).map(|n| arena::OWN_TABLES + n * 0x1000)) {
        put(TABLES + 0x3000 + (page >> 12 & 0x1ff) * 8, 0)?;
    }
    arena::map_own(mem)?;
    // Whose code they are for.
    let level = if place == Place::System { 3 << 45 } else { 0 };
    for (n, e) in LDT.iter().enumerate() {
        // The page of an IDT, which these cases do not have.
        put(IDT_AT as u64 + 8 * n as u64, e.descriptor().low & !level)?;
    }
    if place == Place::System {
        for selector in [FLAT_CODE, FLAT_DATA] {
            let at = TABLES + 0x4000 + u64::from(selector & !7);
            put(at, mem.load(at, Width::Q)? & !level)?;
        }
        // The arena from 0 on, too. The page of a TSS, which these cases do not have either.
        put(POINTERS + system::LOW_POINTERS, TSS_AT as u64 | 1)?;
        put(TSS_AT as u64, (TABLES + 0x3000) | WRITABLE | 4)?;
    }
    Some(())
}

impl Engine {
    /// Makes an engine.
    ///
    /// # Errors
    /// A sentence: it is not to be had here.
    pub fn new(which: Which, place: Place) -> Result<Engine, String> {
        let model = Arc::new(CpuModel::host());
        let mut vcpu: Box<dyn Vcpu> = match which {
            Which::InterpPaged => Box::new(Interpreter::new(model)),
            Which::BtPaged => {
                let mut t = Translator::new(model).map_err(|e| format!("no executable memory: {e}"))?;
                match place {
                    Place::Compat | Place::System => {}
                    Place::Pae => t.set_mirror_after(None),
                    Place::PaeMirror => t.set_mirror_after(Some(Duration::ZERO)),
                }
                Box::new(t)
            }
            other => return Err(format!("{} does not run 16- and 32-bit code", other.name())),
        };
        let legacy = place != Place::Compat;
        let (view, mem) = arena::ram()?;
        tables(&mem, place).ok_or("no room for the tables")?;
        let syscall = if place == Place::System { Intercepts::empty() } else { Intercepts::SYSCALL };
        vcpu.set_intercepts(Intercepts::EXCEPTIONS | syscall);
        let mut template = CpuState::long64(3);
        template.cr3 = arena::TABLES;
        template.tr.limit = 0;
        template.gdtr = Table { base: GDT, limit: arena::GDT_LIMIT };
        template.idtr.limit = 0;
        let limit = 8 * LDT.len() as u32 - 1;
        template.ldtr = Segment { base: LOCAL, limit, attr: Attr::from_bits_retain(0x82), selector: 0x58 };
        if legacy {
            template.efer = Efer::NXE;
            (template.cr3, template.gdtr.base, template.ldtr.base) = (POINTERS, LEGACY_GDT, LEGACY_GDT + 0x1000);
        }
        *vcpu.state() = template.clone();
        let mut tables = vec![0; mem.ram().map_or(0, |r| r.size() - arena::SIZE) as usize];
        mem.read(arena::SIZE, &mut tables).ok_or("RAM cannot be read")?;
        Ok(Engine { which, place, vcpu, view, mem, template, tables, planted: None })
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self.place {
            Place::Compat => self.which.name(),
            Place::Pae => "bt-pae",
            Place::PaeMirror => "bt-pae-mirror",
            Place::System if self.which == Which::InterpPaged => "interp",
            Place::System => "bt",
        }
    }

    /// Plants a bug.
    pub fn plant(&mut self, planted: Planted) {
        self.planted = Some(planted);
    }

    /// The system registers of its cases.
    pub fn template(&self) -> &CpuState {
        &self.template
    }

    /// Is the instruction of a case the same in its mode?
    pub fn takes(&self, case: &Case) -> bool {
        match self.place {
            Place::System => case.kind.is_system(),
            _ if case.kind.is_system() => false,
            Place::Compat => true,
            _ => !case.kind.is_single() || is_same_in_legacy_mode(case.insn),
        }
    }

    /// The code in memory was changed from outside.
    pub fn code_changed(&mut self, page: u64) {
        if let Some(ram) = self.mem.ram() {
            ram.wrote((page - arena::BASE) & !0xfff);
        }
    }

    /// Makes all RAM what it was, with these bytes in the arena.
    pub fn restore(&mut self, arena: &[u8]) {
        for (n, wanted) in arena.chunks(0x1000).chain(self.tables.chunks(0x1000)).enumerate() {
            let (at, mut is) = (n as u64 * 0x1000, [0; 0x1000]);
            if self.mem.read(at, &mut is).is_some() && is != *wanted {
                self.mem.write(at, wanted);
                self.mem.ram().inspect(|ram| ram.wrote(at));
            }
        }
    }

    /// Runs a case at CPL 0, in real mode or virtual-8086 mode, whose memory is set up.
    ///
    /// # Errors
    /// The engine left in a way that no instruction of the case can cause.
    pub fn run_system(&mut self, case: &Case, out: &mut Outcome) -> Result<(), String> {
        let judged = system::is_judged(case);
        restart_time(&mut *self.vcpu, 0);
        system::start(case, &self.template, self.vcpu.state()).ok_or("a selector of no segment")?;
        let start = self.vcpu.state().clone();
        let exit = self.vcpu.run(Board { mem: &self.mem, bus: &EmptyBus }, BUDGET);
        if let Some(planted) = &mut self.planted {
            planted(case, self.vcpu.state());
        }
        let s = self.vcpu.state();
        take_registers(s, out);
        (out.fs_base, out.selectors) = (case.fs_base, case.selectors);
        out.other.clear();
        out.end = match exit {
            Exit::Exception(fault) if judged => End::Fault(system::as_user(case.kind, fault)),
            Exit::Exception(fault) => End::Fault(fault),
            _ => End::Left,
        };
        if exit == Exit::Budget {
            return Err(format!("{} does not come to an end", Engine::name(self)));
        }
        if !judged || out.end == End::Left {
            let mut ram = vec![0; self.tables.len() + arena::SIZE as usize];
            self.mem.read(0, &mut ram);
            out.other = system::description(&exit, s, &ram);
        } else {
            out.rflags &= !Rflags::VM.bits();
            if s.seg != start.seg || registers(s) != registers(&start) {
                out.other = "segments, system registers or activity".into();
            }
        }
        Ok(())
    }

    /// Runs a case whose memory is set up.
    ///
    /// # Errors
    /// The engine left in a way that no instruction of a case can cause.
    pub fn run(&mut self, case: &Case, out: &mut Outcome) -> Result<(), String> {
        if case.kind.is_system() {
            return self.run_system(case, out);
        }
        let s = self.vcpu.state();
        s.gpr = case.gpr;
        s.rip = case.rip;
        s.rflags = Rflags::from_bits_retain(case.rflags);
        for (reg, selector) in ORDER.into_iter().zip(case.selectors) {
            s.seg[reg as usize] = segment(selector).ok_or("a selector of no segment")?;
        }
        s.seg[Seg::Gs as usize] = Segment::unusable(0);
        s.xsave.bytes.copy_from_slice(&case.xsave.bytes);
        s.cr2 = 0;
        (s.interrupt_shadow, s.ss_shadow) = (false, false);
        let budget = if self.which == Which::InterpPaged { BUDGET } else { u64::MAX };
        let exit = self.vcpu.run(Board { mem: &self.mem, bus: &EmptyBus }, budget);
        if let Some(planted) = &mut self.planted {
            planted(case, self.vcpu.state());
        }
        let s = self.vcpu.state();
        take_registers(s, out);
        out.fs_base = s.seg[Seg::Fs as usize].base;
        out.selectors = ORDER.map(|g| s.seg[g as usize].selector);
        out.other = others(&self.template, s, out.selectors);
        if !out.other.is_empty() {
            *s = self.template.clone();
        }
        match exit {
            Exit::Exception(fault) => {
                out.end = End::Fault(fault);
                Ok(())
            }
            other => {
                let why = format!("{} left with {other:?} at {:#x}", self.which.name(), s.rip);
                *s = self.template.clone();
                Err(why)
            }
        }
    }
}

/// The registers that 16- and 32-bit code has whatever the mode.
fn take_registers(s: &CpuState, out: &mut Outcome) {
    out.gpr = s.gpr.map(|v| v & 0xffff_ffff);
    (out.rip, out.rflags) = (s.rip, s.rflags.bits());
    out.xsave.bytes.copy_from_slice(&s.xsave.bytes);
}

/// Does an instruction do the same outside IA-32e mode? Descriptors and gates have other formats there (SDM 3A 3.4.5, 5.8.3).
pub fn is_same_in_legacy_mode(code: Code) -> bool {
    let f = facts(code);
    f.sensitivity == Sensitivity::Innocuous && !matches!(f.class, Class::Segment | Class::System) && !is_far(code)
}

fn is_far(code: Code) -> bool {
    code.is_jmp_far()
        || code.is_jmp_far_indirect()
        || code.is_call_far()
        || code.is_call_far_indirect()
        || matches!(code.mnemonic(), Mnemonic::Retf | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Int | Mnemonic::Into)
}

impl Runs for Engine {
    fn name(&self) -> &'static str {
        Engine::name(self)
    }
    fn view(&self) -> View {
        self.view
    }
    fn all_changed(&mut self) {
        (0..arena::SIZE).step_by(0x1000).for_each(|page| self.code_changed(arena::BASE + page));
    }
    fn run(&mut self, case: &Case, out: &mut Outcome) -> Result<(), String> {
        Engine::run(self, case, out)
    }
}

/// What else changed: the hidden parts of segment registers, which must be those of their selectors, and system registers.
fn others(template: &CpuState, s: &CpuState, selectors: [u16; 5]) -> String {
    for (reg, selector) in ORDER.into_iter().zip(selectors) {
        let is = s.seg[reg as usize];
        let right = match segment(selector) {
            Some(_) if selector < 4 => is.attr.contains(Attr::UNUSABLE),
            should => should == Some(is),
        };
        if !right {
            return format!("{reg:?} is {is:x?}");
        }
    }
    // An INT3 behind POP SS is reported while the shadow still holds.
    if registers(s) != registers(template) {
        return "system registers or activity".into();
    }
    String::new()
}

/// The system registers that user code leaves alone.
fn registers(s: &CpuState) -> impl PartialEq + use<> {
    (s.cr0, s.cr3, s.cr4, s.cr8, s.xcr0, s.efer, s.dr, s.dr6, s.dr7, (s.activity, s.ldtr, s.tr))
}
