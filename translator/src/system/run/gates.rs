//! What the code does by itself where the interpreter has gone before: SYSCALL, SYSRET, IRETQ, IN, OUT and INVLPG; and when it has the vector registers.

use super::System;
use super::calls::tell_priority;
use crate::emit::slot;
use crate::run::Translator;
use crate::system::area::at;
use crate::system::block::Access as GuestAccess;
use crate::system::cache::next_page;
use crate::system::lower::Kind;
use crate::system::{Control, Mode, xsave};
use bivisor_emulator::cpu::xsave::Layout;
use bivisor_emulator::cpu::{CpuState, Cr0, Cr4, Rflags};
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::interp::sensitive::{fast, io};
use bivisor_emulator::isa::{Gpr, Seg, Width};
use bivisor_emulator::mem::{Access, By, Flushed, PAGE_SIZE, Ram};
use bivisor_emulator::vcpu::Board;
use iced_x86::{Code, Mnemonic};

/// Times that code of CPL 0 is entered with the vector registers after it has used them: at first, and at most if it uses them again soon.
const AWAKE: [u32; 2] = [16, 4096];
/// Times that components above XMM must be found unused.
const UNUSED: u32 = 256;
/// Times it is entered without before that was not soon.
const SLEPT: u32 = 64;

/// Where SS and CS are from, if their descriptors lie one behind the other in the GDT and inside a page, and what is there.
fn user_descriptors(t: &mut Translator, board: Board<'_>, ram: &Ram) -> Option<(u64, [u64; 2])> {
    const LDT: u16 = 4;
    const ACCESSED: u64 = 1 << 40;
    let (cs, ss) = (t.cpu.segment(Seg::Cs).selector, t.cpu.segment(Seg::Ss).selector);
    let at = u64::from(ss & !7);
    let apart = (cs | ss) & LDT == 0 && u64::from(cs & !7) == at + 8 && at + 15 <= u64::from(t.cpu.gdtr.limit);
    let laddr = t.cpu.gdtr.base.wrapping_add(at);
    if at == 0 || !apart || laddr % PAGE_SIZE + 16 > PAGE_SIZE {
        return None;
    }
    let gpa = t.core.mmu.translate(&t.cpu, board.mem, laddr, Access::Read, By::Implicit).ok()?;
    let mut bytes = [0; 16];
    ram.read(gpa, &mut bytes)?;
    let [ss, cs] = [0, 8].map(|n| u64::from_le_bytes(std::array::from_fn(|i| bytes[n + i])));
    (ss & cs & ACCESSED != 0).then_some((laddr, [ss, cs]))
}

impl System {
    pub(super) fn set_upper(&mut self, upper: bool) {
        if std::mem::replace(&mut self.upper, upper) != upper {
            self.close_gates();
        }
        self.area.set(at::UPPER, u64::from(upper));
    }

    /// Components above XMM are in use, or not: then for a while it is as if they were, because signal handlers begin and end with a
    /// change, and with it a change of the mode.
    pub(super) fn follow_upper(&mut self, in_use: bool) {
        self.unused = if in_use { 0 } else { self.unused.saturating_add(1) };
        self.set_upper(in_use || self.upper && self.unused < UNUSED);
    }

    /// The guest is about to use what is above XMM: from now on that is saved too. False if it was before.
    pub(super) fn take_upper(&mut self, t: &mut Translator) -> bool {
        if self.upper || Mode::of(&t.cpu, 3) == Mode::of(&t.cpu, 1) {
            return false;
        }
        self.sync(t);
        self.wants_upper = true;
        true
    }

    /// The guest's kernel is about to use vector registers: for a while they are its own to load and save. False if they were before, or
    /// it may not.
    pub(super) fn wake(&mut self, cpu: &CpuState) -> bool {
        if cpu.cpl() != 0 || self.awake > 0 || Mode::of(cpu, 1) == Mode::of(cpu, 0) {
            return false;
        }
        let [first, most] = AWAKE;
        self.stays_awake = if self.slept < SLEPT { (2 * self.stays_awake).clamp(first, most) } else { first };
        (self.awake, self.slept) = (self.stays_awake, 0);
        self.close_gates();
        true
    }

    /// Which registers of the host code of this mode is to have.
    #[inline]
    pub(super) fn sleep(&self, mode: Mode) {
        let asleep = mode.vectors() == 0;
        self.area.set(at::ASLEEP, asleep.into());
        self.area.set(at::OWN_FS, (mode.user() || !asleep).into());
    }

    /// The mode of the code to run.
    #[inline]
    pub(super) fn mode(&mut self, cpu: &CpuState) -> Option<Mode> {
        let most = match () {
            () if cpu.cpl() == 0 && self.awake == 0 => 0,
            () if self.upper => 3,
            () => 1,
        };
        let mode = self.control.get_or_insert_with(|| Control::of(cpu)).as_ref()?.mode(cpu, most)?;
        Some(if mode.user() && self.mirroring.decide() { mode.mirrored() } else { mode })
    }

    /// Shall user code of block `b` that has left go on in the mirror from now on?
    pub(super) fn is_overtaken(&mut self, t: &Translator, b: u32) -> bool {
        let mode = self.cache.block(b).mode;
        t.cpu.cpl() == 3 && mode.user() && !mode.is_mirrored() && !mode.is_counted() && self.mirroring.decide()
    }

    /// SYSCALL, SYSRET and IRETQ leave until it is known where they go.
    pub(super) fn close_gates(&self) {
        self.area.set(at::SYSCALL, 0);
        self.area.set(at::SYSRET, 0);
        self.area.set(at::IRET, 0);
    }

    /// An instruction may have changed what modes depend on.
    pub(super) fn forget_control(&mut self) {
        self.control = None;
        self.area.set(at::IMAGE, 0);
        self.close_gates();
    }

    /// After SYSCALL, SYSRET or IRETQ by the interpreter, which led to block `b`: from now on they go there by themselves.
    pub(super) fn open_gate(&mut self, t: &mut Translator, board: Board<'_>, ram: &Ram, id: u32, b: u32) {
        if let Some(Some(c)) = self.calls.get(id as usize)
            && let Some(at) = c.image_at
        {
            self.open_image(t, board, ram, &at);
            return;
        }
        let mnemonic = match self.calls.get(id as usize) {
            Some(Some(c)) if !self.is_narrow(id) => c.code.mnemonic(),
            _ => return,
        };
        let descriptors = if mnemonic == Mnemonic::Iretq { user_descriptors(t, board, ram) } else { None };
        let cpu = &t.cpu;
        let (mode, alignment) = (self.cache.block(b).mode, cpu.cr0.contains(Cr0::AM));
        let mut forbidden = Rflags::TF | Rflags::RF | Rflags::VM | Rflags::DF;
        forbidden.set(Rflags::AC, alignment);
        let segments = match mnemonic {
            Mnemonic::Syscall => {
                let kept = fast::kept(cpu);
                let same_mode =
                    !(kept.contains(Rflags::DF) || kept.contains(Rflags::AC) && cpu.cr4.contains(Cr4::SMAP));
                if mode.user() || mode.vectors() != 0 || !same_mode {
                    return;
                }
                let Some(host) = self.cache.enter_target(&self.area, b) else { return };
                self.area.set(at::SYSCALL_KEEP, (kept | Rflags::FIXED).bits());
                self.area.set(at::SYSCALL, host);
                at::SYSCALL_SEGMENTS
            }
            Mnemonic::Sysretq => {
                if !mode.user() || mode.down() || self.cache.enter_target(&self.area, b).is_none() {
                    return;
                }
                let Some(table) = self.cache.targets(mode) else { return };
                self.area.set(at::SYSRET_FORBIDDEN, forbidden.bits());
                self.area.set(at::SYSRET_ASLEEP, u64::from(mode.vectors() == 0));
                self.area.set(at::SYSRET, table as u64);
                at::SYSRET_SEGMENTS
            }
            Mnemonic::Iretq => {
                let plain = mode.user() && !mode.is_narrow() && !mode.down() && mode.vectors() != 0;
                let Some((laddr, descriptors)) = descriptors.filter(|_| plain) else { return };
                if self.cache.enter_target(&self.area, b).is_none() {
                    return;
                }
                let Some(table) = self.cache.targets(mode) else { return };
                self.area.set(at::IRET_FORBIDDEN, (forbidden - Rflags::RF).bits());
                for (slot, seg) in [(at::IRET_CS, Seg::Cs), (at::IRET_SS, Seg::Ss)] {
                    self.area.set(slot, cpu.segment(seg).selector.into());
                }
                self.area.set(at::IRET_GDT, laddr);
                for (n, d) in descriptors.into_iter().enumerate() {
                    self.area.set(at::IRET_DESCRIPTORS + 8 * n, d);
                }
                self.area.set(at::IRET, table as u64);
                at::IRET_SEGMENTS
            }
            _ => return,
        };
        for (n, seg) in [Seg::Cs, Seg::Ss].into_iter().enumerate() {
            let s = cpu.segment(seg);
            let words = [s.base, u64::from(s.limit) | u64::from(s.attr.bits()) << 32, s.selector.into()];
            for (word, v) in words.into_iter().enumerate() {
                self.area.set(segments + 8 * (3 * n + word), v);
            }
        }
    }

    /// After XSAVE or XRSTOR by the interpreter, which found its image there: from now on the code does it by itself.
    pub(super) fn open_image(&mut self, t: &mut Translator, board: Board<'_>, ram: &Ram, image: &GuestAccess) {
        let l = Layout::host();
        // All but the registers' place: x87 and vector instructions would run.
        if Mode::of(&t.cpu, 3).is_none_or(|m| m.vectors() == 0) || t.cpu.xcr0 != l.components {
            return;
        }
        let model = t.cache.model();
        let mut open = xsave::OPEN;
        open |= if model.supports(Code::Xsavec64_mem) { xsave::COMPACT } else { 0 };
        // SDM 1 8.1.8.
        open |= if model.cpuid(&t.cpu, 7, 0)[1] >> 13 & 1 != 0 { xsave::NO_SELECTORS } else { 0 };
        self.area.set(at::IMAGE, open);
        for disp in [image.disp, image.disp + l.size as i64 - 1] {
            self.fill(t, board, ram, &GuestAccess { disp, ..*image }, 1);
        }
    }

    /// INVLPG of the address in its slot. False if the code of block `b` must be left: something else has changed too, or it may not
    /// be mapped any more as it was.
    pub(super) fn invalidate(&mut self, t: &mut Translator, ram: &Ram, b: u32) -> bool {
        let (laddr, same) = (self.area.get(at::TEMP), self.is_same(t, ram));
        t.stats.steps += 1;
        self.ports[2] += 1;
        t.core.mmu.flush_page(laddr);
        let Flushed::Page(page) = t.core.mmu.flushed() else { return false };
        if same {
            self.mapping = t.core.mmu.generation();
            self.flush_page(page);
        }
        let block = self.cache.block(b);
        let its_own = |rip: u64| rip / PAGE_SIZE == page / PAGE_SIZE;
        same && !its_own(block.rip) && !(block.second.is_some() && its_own(next_page(block.rip)))
    }

    /// IN, OUT or INVLPG at CPL 0, called from the code: where to go on, or 0 if it must be left.
    pub(super) fn device(
        &mut self,
        t: &mut Translator,
        board: Board<'_>,
        ram: &Ram,
        block: &ThreadBlock,
        id: u32,
    ) -> u64 {
        let exit = *self.cache.exit(id);
        if let Kind::Invalidate { resume } = exit.kind {
            let stays = self.invalidate(t, ram, exit.block) && block.scratch[slot::LOOK].get() == 0;
            return if stays { self.cache.host(resume) } else { 0 };
        }
        let Kind::Port { port, width, write, resume } = exit.kind else { return 0 };
        let register = |r: Gpr| at::CALLER + 8 * r as usize;
        let port = port.unwrap_or(self.area.get(register(Gpr::Rdx)) as u16);
        t.cpu.gpr[Gpr::Rax as usize] = self.area.get(register(Gpr::Rax));
        self.access_port(t, board, port, width, write);
        self.area.set(register(Gpr::Rax), t.cpu.gpr[Gpr::Rax as usize]);
        self.area.set(at::PENDING, if self.line { Rflags::IF.bits() } else { 0 });
        let due = self.line && self.area.get(at::INTERRUPTS) != 0 || self.nmi && !t.cpu.nmi_blocked;
        if due || !self.is_same(t, ram) || block.scratch[slot::LOOK].get() != 0 {
            return 0;
        }
        self.cache.host(resume)
    }

    /// The work of IN or OUT, by the interpreter's functions; RAX is in the state.
    #[inline]
    pub(super) fn access_port(&mut self, t: &mut Translator, board: Board<'_>, port: u16, width: Width, write: bool) {
        t.stats.steps += 1;
        self.ports[usize::from(write)] += 1;
        tell_priority(&self.area, &mut t.cpu, board);
        if write {
            io::write_port(board.bus, port, width, t.cpu.read(Gpr::Rax, width));
        } else {
            let v = io::read_port(board.bus, port, width);
            t.cpu.write(Gpr::Rax, width, v);
        }
        self.ask_line(board);
    }
}
