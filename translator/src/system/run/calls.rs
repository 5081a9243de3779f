//! Calls of the interpreter for one instruction, from the code and back into it, and what the state must know for that.

use super::{Next, System, Via, resume};
use crate::emit::slot;
use crate::run::Translator;
use crate::system::Mode;
use crate::system::area::{Area, at};
use crate::system::block::{Access as GuestAccess, operand_of};
use crate::system::cache::Cache;
use crate::system::lower::{Flags, Kind, Told};
use bivisor_emulator::cpu::msr::index;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::interp::Prepared;
use bivisor_emulator::isa::{Class, Gpr, Insn, Seg, Sensitivity, StateImage, decode, state_image};
use bivisor_emulator::mem::Ram;
use bivisor_emulator::vcpu::{Board, Exit};
use iced_x86::{Code, Mnemonic, Register};

/// An instruction that the interpreter does, and what followed it last.
pub(super) struct Call {
    pub(super) insn: Prepared,
    /// It changes general registers only, if it completes.
    pub(super) steady: bool,
    /// It reads or writes CR8.
    pub(super) priority: bool,
    /// It changes nothing of [`Control`].
    pub(super) quiet: bool,
    /// It may load ES, DS, FS or GS.
    pub(super) segments: bool,
    /// It is XSAVE, XRSTOR or the like.
    pub(super) image: bool,
    /// Where the image is, if the code may come to do it.
    pub(super) image_at: Option<GuestAccess>,
    /// It stands for [`Kind::Step`], without vector registers or for their image: where things are when it is reached.
    pub(super) light: bool,
    pub(super) rip: u64,
    pub(super) spilled: u16,
    pub(super) flags: Flags,
    pub(super) told: Option<Told>,
    pub(super) code: Code,
    pub(super) times: u64,
    pub(super) next: u64,
    pub(super) block: u32,
    /// [`bivisor_emulator::mem::Mmu::generation`] then.
    pub(super) mapping: u64,
}

/// Does an instruction that completes change nothing of the CPU but general registers?
pub(super) fn is_steady(insn: &Insn) -> bool {
    use Mnemonic as M;
    matches!(insn.iced.mnemonic(), M::In | M::Out | M::Cpuid | M::Rdmsr | M::Rdpmc | M::Xgetbv)
        || insn.iced.mnemonic() == M::Mov && insn.iced.op1_register().is_cr()
}

/// Does it change nothing of [`Control`], nor its exception?
pub(super) fn is_quiet(insn: &Insn) -> bool {
    use Mnemonic as M;
    let known = matches!(
        insn.iced.mnemonic(),
        M::In
            | M::Out
            | M::Syscall
            | M::Sysretq
            | M::Iretq
            | M::Iretd
            | M::Sysenter
            | M::Sysexit
            | M::Int
            | M::Int3
            | M::Cpuid
            | M::Rdmsr
            | M::Verr
            | M::Verw
            | M::Stac
            | M::Clac
            | M::Swapgs
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Invlpg
            | M::Invpcid
    ) || matches!(state_image(insn.iced.mnemonic()), Some(StateImage::Xsave | StateImage::Xrstor));
    // MOV of a segment register, of CR2 and of CR3.
    let mov = insn.iced.mnemonic() == M::Mov && {
        let (to, from) = (insn.iced.op0_register(), insn.iced.op1_register());
        to.is_segment_register()
            || from.is_segment_register()
            || from.is_cr()
            || matches!(to, Register::CR2 | Register::CR3)
    };
    known
        || mov
        || insn.facts.sensitivity == Sensitivity::Innocuous
            && !matches!(insn.facts.class, Class::Native | Class::System)
}

/// The operand of XSAVE64 and XRSTOR64.
fn image_at(insn: &Insn) -> Option<GuestAccess> {
    match insn.iced.code() {
        code @ (Code::Xsave64_mem | Code::Xrstor64_mem) => operand_of(&insn.iced, 1, code == Code::Xsave64_mem),
        _ => None,
    }
}

/// May it load ES, DS, FS or GS?
fn is_segments(insn: &Insn) -> bool {
    use Mnemonic as M;
    insn.iced.op0_register().is_segment_register()
        || matches!(insn.iced.mnemonic(), M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss)
}

/// Registers and flags from slots back into the state: which are spilled, where the flags are, how they are told.
#[inline(always)]
pub(super) fn mend(
    area: &Area,
    cache: &Cache,
    cpu: &mut CpuState,
    board: Board<'_>,
    (spilled, flags, told): (u16, Flags, Option<Told>),
) {
    let mut rest = spilled;
    while rest != 0 {
        let r = rest.trailing_zeros() as usize;
        cpu.gpr[r] = area.get(at::SPILL + 8 * r);
        rest &= rest - 1;
    }
    let status = area.get_u16(if flags == Flags::Slot { at::STATUS } else { at::EXIT_STATUS });
    let replay = match told {
        Some(Told::Here(r)) => Some(r),
        Some(Told::Before) => cache.recipe(area.get(at::RECIPE)),
        None => None,
    };
    let status = match replay {
        Some(r) if flags == Flags::Slot => r.status(cpu),
        _ => Rflags::from_bits_retain(status >> 8 & 0xd5 | (status & 1) << 11),
    };
    let own = Rflags::from_bits_retain(area.get(at::FLAGS) | area.get(at::INTERRUPTS));
    cpu.rflags = own | status;
    cpu.seg[Seg::Gs as usize].base = area.get(at::GS_BASE);
    cpu.msr.kernel_gs_base = area.get(at::KERNEL_GS_BASE);
    tell_priority(area, cpu, board);
}

/// CR8 as the code has left it, to the bus.
#[inline(always)]
pub(super) fn tell_priority(area: &Area, cpu: &mut CpuState, board: Board<'_>) {
    let (priority, told) = (area.get(at::CR8), area.get(at::CR8_BUS));
    if priority != told {
        cpu.cr8 = priority;
        board.bus.set_task_priority(priority as u8);
        area.set(at::CR8_BUS, priority);
    }
}

/// The status flags as their slot has them.
pub(super) fn status(flags: Rflags) -> u64 {
    (flags.bits() & 0xd5) << 8 | flags.bits() >> 11 & 1
}

impl System {
    /// The instruction at RIP, which an exit stands for, without decoding it each time.
    pub(super) fn call(&mut self, t: &mut Translator, board: Board<'_>, ram: &Ram, id: u32) -> Exit {
        let n = id as usize;
        let fault = self.fault.take();
        if self.calls.len() <= n {
            self.calls.resize_with(n + 1, || None);
        }
        if self.calls[n].is_none() {
            let bits = if self.is_narrow(id) { 32 } else { 64 };
            let insn = self.cache.bytes(ram, id, t.cpu.rip).and_then(|b| decode(&b, bits).ok());
            let Some(insn) = insn else {
                self.forget_control();
                return t.core.run(&mut t.cpu, board, 1, None);
            };
            let (code, steady, quiet) = (insn.iced.code(), is_steady(&insn), is_quiet(&insn));
            let exit = self.cache.exit(id);
            let (rip, spilled, flags, told) = (exit.rip, exit.spilled, exit.flags, exit.told);
            let image = state_image(insn.iced.mnemonic()).is_some();
            let light = exit.kind == Kind::Step && (!exit.native || image);
            let segments = is_segments(&insn);
            let image_at = image_at(&insn).filter(|_| bits == 64);
            let priority = [0, 1].map(|i| insn.iced.op_register(i)).contains(&Register::CR8);
            let insn = t.core.prepare(&mut t.cpu, board, insn);
            self.calls[n] = Some(Box::new(Call {
                insn,
                steady,
                priority,
                quiet,
                segments,
                image,
                image_at,
                light,
                rip,
                spilled,
                flags,
                told,
                code,
                times: 0,
                next: 0,
                block: u32::MAX,
                mapping: 0,
            }));
        }
        match &mut self.calls[n] {
            Some(c) => {
                c.times += 1;
                let other = |n| !matches!(n, index::EFER | index::STAR | index::LSTAR | index::CSTAR | index::FMASK);
                let quiet = c.quiet || c.code == Code::Wrmsr && other(t.cpu.gpr[Gpr::Rcx as usize] as u32);
                let cr0 = t.cpu.cr0;
                let exit = match fault {
                    Some(fault) => t.core.fault(&mut t.cpu, board, fault),
                    None => t.core.execute(&mut t.cpu, board, &c.insn),
                };
                // A task switch sets TS.
                if !quiet || t.cpu.cr0 != cr0 {
                    self.forget_control();
                } else if c.segments {
                    self.area.set(at::IRET, 0);
                }
                exit
            }
            None => t.core.run(&mut t.cpu, board, 1, None),
        }
    }

    /// As [`System::left`] and [`System::call_out`] for an exit that was taken before, if it is one of the usual ones.
    #[inline]
    pub(super) fn quick(
        &mut self,
        t: &mut Translator,
        board: Board<'_>,
        ram: &Ram,
        block: &ThreadBlock,
        id: u32,
    ) -> Option<Next> {
        let c = self.calls.get(id as usize)?.as_deref().filter(|c| c.light)?;
        t.cpu.rip = c.rip;
        mend(&self.area, &self.cache, &mut t.cpu, board, (c.spilled, c.flags, c.told));
        if c.image {
            self.sync(t);
        }
        Some(self.call_out(t, board, ram, block, id, Via::Call(id)))
    }

    /// After a call of the interpreter: is there an event to take, or has something changed that only the dispatch loop looks at?
    #[inline]
    fn is_due(&self, t: &Translator, ram: &Ram, block: &ThreadBlock) -> bool {
        block.scratch[slot::LOOK].get() != 0
            || t.kicker.requested()
            || self.watches != ram.watches()
            || self.due(&t.cpu)
    }

    /// Has nothing changed of mappings and code?
    #[inline]
    pub(super) fn is_same(&self, t: &Translator, ram: &Ram) -> bool {
        self.mapping == t.core.mmu.generation()
            && self.epoch == ram.code_epoch()
            && self.watches == ram.watches()
            && self.flushes == self.cache.counts.flushes
    }

    /// One instruction by the interpreter, without its vector registers, and at once back into the code if nothing else is to be done.
    pub(super) fn call_out(
        &mut self,
        t: &mut Translator,
        board: Board<'_>,
        ram: &Ram,
        block: &ThreadBlock,
        id: u32,
        via: Via,
    ) -> Next {
        t.stats.steps += 1;
        let exit = self.call(t, board, ram, id);
        let image = matches!(self.calls.get(id as usize), Some(Some(c)) if c.image);
        self.follow_priority(&t.cpu, board, Some(id));
        self.ask_line(board);
        if exit != Exit::Budget {
            self.sync(t);
            return Next::Out(exit);
        }
        if self.is_due(t, ram, block) {
            return Next::Go(via);
        }
        if !self.is_same(t, ram) {
            self.look_around(t, board, ram);
            if self.flushes != self.cache.counts.flushes {
                return Next::Go(Via::Start);
            }
        }
        resume(&mut t.cpu);
        // XRSTOR may have filled them, and SYSRET in the cache does not look.
        if self.area.get(at::VECTORS_AT) == 0 {
            let in_use = t.cpu.xsave.xstate_bv() & super::UPPER != 0;
            if in_use || image {
                self.follow_upper(in_use);
            }
        }
        let Some(mode) = self.mode(&t.cpu) else { return Next::Go(via) };
        if mode.is_mirrored() {
            self.map_wanted(t, board, ram);
        }
        let Some(b) = self.find(t, board, ram, mode, via) else { return Next::Go(Via::Start) };
        if self.flushes != self.cache.counts.flushes {
            return Next::Go(Via::Start);
        }
        self.open_gate(t, board, ram, id, b);
        self.load(&t.cpu);
        self.sleep(mode);
        self.load_resident(&t.cpu, mode);
        Next::Resume(self.cache.host(self.cache.block(b).entries.both()))
    }

    /// The state's flags and bases into their slots.
    pub(super) fn load(&self, cpu: &CpuState) {
        let flags = cpu.rflags;
        self.area.set(at::STATUS, status(flags));
        self.area.set(at::FLAGS, ((flags - Rflags::STATUS - Rflags::IF) | Rflags::FIXED).bits());
        self.area.set(at::INTERRUPTS, (flags & Rflags::IF).bits());
        self.area.set(at::PENDING, if self.line { Rflags::IF.bits() } else { 0 });
        self.area.set(at::FS_BASE, cpu.seg[Seg::Fs as usize].base);
        self.area.set(at::GS_BASE, cpu.seg[Seg::Gs as usize].base);
        self.area.set(at::KERNEL_GS_BASE, cpu.msr.kernel_gs_base);
        self.area.set(at::TSC_OFFSET, cpu.msr.tsc_offset);
        self.area.set(at::GDT, cpu.gdtr.base);
        self.area.set(at::GDT_LAST, u64::from(cpu.gdtr.limit).saturating_sub(7));
    }

    /// Registers without a name in 32-bit code of this mode into their slots.
    pub(super) fn load_resident(&self, cpu: &CpuState, mode: Mode) {
        let mut rest = mode.resident();
        while rest != 0 {
            let r = rest.trailing_zeros() as usize;
            self.area.set(at::SPILL + 8 * r, cpu.gpr[r]);
            rest &= rest - 1;
        }
    }

    /// Is an exit one of 32-bit code?
    pub(super) fn is_narrow(&self, id: u32) -> bool {
        self.cache.block(self.cache.exit(id).block).mode.is_narrow()
    }

    pub(super) fn mend(&self, cpu: &mut CpuState, board: Board<'_>, spilled: u16, flags: Flags, told: Option<Told>) {
        mend(&self.area, &self.cache, cpu, board, (spilled, flags, told));
    }

    /// CR8 is not known any more: the interpreter may have changed the local APIC.
    pub(super) fn forget_priority(&self) {
        self.area.set(at::CR8, u64::MAX);
        self.area.set(at::CR8_BUS, u64::MAX);
    }

    /// After the instruction of this exit: is CR8 known now, or no longer?
    pub(super) fn follow_priority(&self, cpu: &CpuState, board: Board<'_>, id: Option<u32>) {
        let call = id.and_then(|id| self.calls.get(id as usize)?.as_ref());
        match call {
            Some(c) if c.priority => {
                let v = board.bus.task_priority().map_or(cpu.cr8, u64::from);
                self.area.set(at::CR8, v);
                self.area.set(at::CR8_BUS, v);
            }
            Some(c) if c.steady => {}
            _ => self.forget_priority(),
        }
    }
}
