//! The run loop: events at the instruction boundary, fetch, decode, privilege, execute, commit (SDM 3A 6.9).
//!
//! Most instructions run in [`run_window`], which knows that nothing can happen between two of them but what the marks of an
//! instruction say. Single step, breakpoints, RF and interrupt shadows go the careful way, one instruction at a time.

use crate::cpu::{Activity, CpuState, Fault, Rflags};
use crate::interp::access::Lane;
use crate::interp::deliver::{Event, deliver};
use crate::interp::fetch::{self, Context, Window};
use crate::interp::icache::{Entry, ICache, Marks};
use crate::interp::{Core, Env, Exec, Stop, Why, check, watch};
use crate::isa::Insn;
use crate::mem::{Mmu, PAGE_SIZE};
use crate::vcpu::{Board, Exit, Intercepts, Kicker};
use iced_x86::{Mnemonic, Register};
use std::sync::atomic::Ordering;

/// Instructions between two looks at the kicker and the interrupt line.
const SLICE: u64 = 512;

/// DR6.BS: the cause is a single step.
const DR6_BS: u64 = 1 << 14;

/// IA32_DEBUGCTL.BTF: single steps are those from branch to branch.
const BTF: u64 = 2;

/// An instruction made ready for [`Core::execute`].
pub struct Prepared(Entry);

impl Core {
    /// Runs at most `budget` instructions of `cpu`. Without a kicker interrupts are not looked at either.
    pub fn run(&mut self, cpu: &mut CpuState, board: Board<'_>, budget: u64, kicker: Option<&Kicker>) -> Exit {
        if self.memory != board.mem.id() {
            self.memory = board.mem.id();
            self.forget();
        }
        let mut left = budget;
        let mut x = exec(cpu, &mut self.mmu, &mut self.env, board, self.intercepts);
        let exit = loop {
            if left == 0 {
                break Exit::Budget;
            }
            if let Some(kicker) = kicker {
                if kicker.requested() && kicker.take() {
                    break Exit::Kicked;
                }
                if let Err(exit) = interrupt(&mut x) {
                    break exit;
                }
            }
            match x.cpu.activity {
                Activity::Active => {}
                Activity::Halted => break Exit::Halt,
                Activity::Shutdown => break Exit::Shutdown,
            }
            x.attention = false;
            let most = left.min(SLICE);
            if let Err(exit) = some(&mut x, &mut self.icache, most, &mut left) {
                break exit;
            }
        };
        x.env.native.leave(&mut x.cpu.xsave);
        self.instructions += budget - left;
        exit
    }

    /// Makes an instruction ready for [`Core::execute`].
    pub fn prepare(&mut self, cpu: &mut CpuState, board: Board<'_>, insn: Insn) -> Prepared {
        let mut x = exec(cpu, &mut self.mmu, &mut self.env, board, self.intercepts);
        Prepared(Entry::new(insn, &mut x))
    }

    /// As [`Core::step`], of an instruction that was decoded at RIP before. For engines that know that nothing has to be looked at before
    /// it: no single step, breakpoint, interrupt shadow or RF; and that the memory is the one of the last [`Core::run`].
    pub fn execute(&mut self, cpu: &mut CpuState, board: Board<'_>, i: &Prepared) -> Exit {
        let mut left = 1;
        let context = Context::of(cpu);
        let mut x = exec(cpu, &mut self.mmu, &mut self.env, board, self.intercepts);
        // IRET reads its frame before it changes anything.
        if i.0.marks.is_empty() || i.0.insn.iced.mnemonic() == Mnemonic::Iretq {
            x.lane = Lane::of(x.cpu, x.mem, x.mmu);
        }
        let done = one(&mut x, &i.0, context, &mut left);
        x.lane = Lane::default();
        let done = done.or_else(|stop| stopped(&mut x, stop, &mut left));
        x.env.native.leave(&mut x.cpu.xsave);
        self.instructions += 1 - left;
        done.err().unwrap_or(Exit::Budget)
    }

    /// As [`Core::execute`] of an instruction that raises `fault`, which the caller has found out by itself.
    pub fn fault(&mut self, cpu: &mut CpuState, board: Board<'_>, fault: Fault) -> Exit {
        let mut left = 1;
        let mut x = exec(cpu, &mut self.mmu, &mut self.env, board, self.intercepts);
        let done = stopped(&mut x, fault.into(), &mut left);
        self.instructions += 1 - left;
        done.err().unwrap_or(Exit::Budget)
    }

    /// Delivers an event through the guest's IVT or IDT, for callers that intercept exceptions and then want them delivered.
    ///
    /// # Errors
    /// [`Exit::Shutdown`] on a triple fault.
    pub fn deliver(&mut self, cpu: &mut CpuState, board: Board<'_>, event: Event) -> Result<(), Exit> {
        self.mmu.flush();
        let mut x = exec(cpu, &mut self.mmu, &mut self.env, board, Intercepts::empty());
        delivered(deliver(&mut x, event))
    }
}

fn exec<'a>(
    cpu: &'a mut CpuState,
    mmu: &'a mut Mmu,
    env: &'a mut Env,
    board: Board<'a>,
    intercepts: Intercepts,
) -> Exec<'a> {
    let next_rip = cpu.rip;
    Exec {
        cpu,
        mmu,
        mem: board.mem,
        bus: board.bus,
        intercepts,
        next_rip,
        env,
        attention: false,
        watching: false,
        hits: 0,
        lane: Lane::default(),
    }
}

/// Takes a non-maskable or an external interrupt if there is one and it is not held (SDM 3A table 6-2: NMI first).
#[inline(always)]
fn interrupt(x: &mut Exec<'_>) -> Result<(), Exit> {
    if x.bus.nmi_pending() && !x.cpu.nmi_blocked && !x.cpu.interrupt_shadow {
        return take_nmi(x);
    }
    if x.cpu.rflags.contains(Rflags::IF) && !x.cpu.interrupt_shadow && x.bus.interrupt_pending() {
        return take_interrupt(x);
    }
    Ok(())
}

#[cold]
fn take_nmi(x: &mut Exec<'_>) -> Result<(), Exit> {
    if x.bus.take_nmi() { delivered(deliver(x, Event::Nmi)) } else { Ok(()) }
}

#[cold]
fn take_interrupt(x: &mut Exec<'_>) -> Result<(), Exit> {
    match x.bus.take_interrupt() {
        Some(vector) => delivered(deliver(x, Event::External(vector))),
        None => Ok(()),
    }
}

/// A fault cannot come out of [`deliver`]: it has dealt with it.
fn delivered(r: Result<(), Stop>) -> Result<(), Exit> {
    match r.map_err(|stop| stop.why()) {
        Ok(()) | Err(Why::Fault(_)) => Ok(()),
        Err(Why::Exit(exit)) => Err(exit),
    }
}

/// Some instructions, at most `most`; each is counted off `left`.
fn some(x: &mut Exec<'_>, cache: &mut ICache, most: u64, left: &mut u64) -> Result<(), Exit> {
    let context = Context::of(x.cpu);
    if needs_care(x.cpu) {
        return careful(x, cache, context, left);
    }
    let done = match fetch::window(x, cache, context) {
        Ok(Some(window)) => run_window(x, window, context, most, left),
        Ok(None) => alone(x, context, left),
        Err(stop) => Err(stop),
    };
    done.or_else(|stop| stopped(x, stop, left))
}

/// Does anything have to be looked at before or after each instruction?
#[inline(always)]
fn needs_care(cpu: &CpuState) -> bool {
    const FLAGS: Rflags = Rflags::TF.union(Rflags::RF);
    cpu.rflags.intersects(FLAGS) || cpu.interrupt_shadow || watch::enabled(cpu) || cpu.pending_debug != 0
}

/// The hot loop: instructions of one page, until something must be looked at.
#[inline(always)]
fn run_window(x: &mut Exec<'_>, window: Window<'_>, context: Context, most: u64, left: &mut u64) -> Result<(), Stop> {
    let mut todo = most;
    let done = if window.page.is_unwatched() {
        run_unwatched(x, window, context, &mut todo)
    } else {
        x.lane = Lane::of(x.cpu, x.mem, x.mmu);
        run_entries(x, window, context, &mut todo)
    };
    x.lane = Lane::default();
    *left -= most - todo;
    done
}

/// As [`run_window`], counting `todo` down to 0.
#[inline(always)]
fn run_entries(x: &mut Exec<'_>, window: Window<'_>, context: Context, todo: &mut u64) -> Result<(), Stop> {
    let Window { page, base } = window;
    let epoch = page.epoch();
    let epoch_cell = x.mem.epoch_cell();
    let mut at = x.cpu.rip;
    let mut n = page.find(at.wrapping_sub(base) as usize);
    while *todo > 0 {
        let Some(entry) = page.entry(n) else {
            let offset = at.wrapping_sub(base) as usize;
            match fetch::decode_in(x, page, offset, context)? {
                None => n = page.find(offset),
                Some(entry) => return one(x, &entry, context, todo),
            }
            continue;
        };
        let following = at.wrapping_add(u64::from(entry.insn.len)) & context.mask;
        x.next_rip = following;
        if entry.hurries {
            (entry.op)(x, &entry.insn)?;
            x.cpu.rip = following;
            at = following;
            *todo -= 1;
            n += 1;
            continue;
        }
        if !entry.marks.is_empty() {
            // It may change what this loop relies on.
            x.lane = Lane::default();
            let entry = entry.clone();
            return one(x, &entry, context, todo);
        }
        let jumps = entry.jumps;
        (entry.op)(x, &entry.insn)?;
        // What was just written comes late out of memory.
        let next = if jumps { x.next_rip } else { following };
        debug_assert_eq!(next, x.next_rip, "only branches go elsewhere, and what has marks");
        x.cpu.rip = next;
        *todo -= 1;
        at = next;
        let offset = next.wrapping_sub(base);
        if offset >= PAGE_SIZE || x.attention || epoch_cell.load(Ordering::Acquire) != epoch {
            break;
        }
        n = if next == following { page.after(n, offset as usize) } else { page.find(offset as usize) };
    }
    Ok(())
}

/// As [`run_entries`] for a page that is written all the time: each instruction is compared with memory before it is executed.
#[cold]
fn run_unwatched(x: &mut Exec<'_>, window: Window<'_>, context: Context, todo: &mut u64) -> Result<(), Stop> {
    let Window { page, base } = window;
    let epoch = page.epoch();
    while *todo > 0 {
        let offset = x.cpu.rip.wrapping_sub(base) as usize;
        if offset >= PAGE_SIZE as usize || x.attention || x.mem.code_epoch() != epoch {
            break;
        }
        let same = match page.entry(page.find(offset)) {
            Some(entry) => {
                let len = usize::from(entry.insn.len);
                page.is_same(x.mem, offset, len)
            }
            None => false,
        };
        if !same && page.refresh(x.mem).is_none() {
            break;
        }
        let entry = match page.entry(page.find(offset)) {
            Some(entry) => entry.clone(),
            None => match fetch::decode_in(x, page, offset, context)? {
                None => continue,
                Some(_) => return alone(x, context, todo),
            },
        };
        one(x, &entry, context, todo)?;
        if !entry.marks.is_empty() {
            break;
        }
    }
    Ok(())
}

/// One instruction that no window holds.
#[cold]
fn alone(x: &mut Exec<'_>, context: Context, left: &mut u64) -> Result<(), Stop> {
    let entry = Entry::new(fetch::fetch(x, context)?, x);
    one(x, &entry, context, left)
}

/// One instruction, by its marks.
fn one(x: &mut Exec<'_>, entry: &Entry, context: Context, left: &mut u64) -> Result<(), Stop> {
    if entry.marks.contains(Marks::CAREFUL) {
        return carefully(x, entry, context, left);
    }
    execute(x, entry, context, left)
}

/// Checks, executes and commits one instruction.
fn execute(x: &mut Exec<'_>, entry: &Entry, context: Context, left: &mut u64) -> Result<(), Stop> {
    let at = x.cpu.rip;
    x.next_rip = at.wrapping_add(u64::from(entry.insn.len)) & context.mask;
    if entry.marks.contains(Marks::CHECK) {
        check::before(x, &entry.insn)?;
    }
    (entry.op)(x, &entry.insn)?;
    x.cpu.rip = x.next_rip;
    // A long repetition that is not done yet does not count.
    if !(entry.marks.contains(Marks::REPEATS) && x.next_rip == at) {
        *left -= 1;
    }
    Ok(())
}

/// One instruction with all that may happen round it: breakpoint before, single-step trap after.
#[cold]
fn careful(x: &mut Exec<'_>, cache: &mut ICache, context: Context, left: &mut u64) -> Result<(), Exit> {
    let pending = if x.cpu.interrupt_shadow { 0 } else { std::mem::take(&mut x.cpu.pending_debug) };
    let done = match pending | watch::at_rip(x) {
        0 => next_entry(x, cache, context).and_then(|entry| carefully(x, &entry, context, left)),
        hit => Err(Fault::Db(hit).into()),
    };
    done.or_else(|stop| stopped(x, stop, left))
}

/// The instruction at RIP, from the cache if it is there.
fn next_entry(x: &mut Exec<'_>, cache: &mut ICache, context: Context) -> Result<Entry, Stop> {
    if let Some(Window { page, base }) = fetch::window(x, cache, context)? {
        let offset = x.cpu.rip.wrapping_sub(base) as usize;
        if page.entry(page.find(offset)).is_none()
            && let Some(entry) = fetch::decode_in(x, page, offset, context)?
        {
            return Ok(entry);
        }
        if let Some(entry) = page.entry(page.find(offset)) {
            return Ok(entry.clone());
        }
    }
    Ok(Entry::new(fetch::fetch(x, context)?, x))
}

fn carefully(x: &mut Exec<'_>, entry: &Entry, context: Context, left: &mut u64) -> Result<(), Stop> {
    let (before, at) = (x.cpu.rflags, x.cpu.rip);
    let shadow = std::mem::take(&mut x.cpu.interrupt_shadow);
    let pending = std::mem::take(&mut x.cpu.pending_debug);
    (x.watching, x.hits) = (watch::enabled(x.cpu), 0);
    let done = execute(x, entry, context, left);
    let hits = std::mem::take(&mut x.hits) | pending;
    x.watching = false;
    if let Err(stop) = done {
        if stop.why() == Why::Exit(Exit::Halt) && before.contains(Rflags::TF) {
            // A debug exception ends the halt at once.
            *left -= 1;
            x.cpu.rip = x.next_rip;
            return Err(Fault::Db(DR6_BS).into());
        }
        // What did not happen has not used the shadow up, nor has what is done elsewhere. INT3 and INTO did happen.
        x.cpu.interrupt_shadow = shadow;
        let happened = matches!(stop.why(), Why::Fault(f) if f.is_trap());
        x.cpu.pending_debug = if happened { hits } else { pending };
        return Err(stop);
    }
    let m = entry.insn.iced.mnemonic();
    // SDM 3B 17.3.1.1: RF is cleared by every instruction but IRET, which may set it, and a repetition keeps it for its next element.
    let goes_on = entry.marks.contains(Marks::REPEATS) && x.cpu.rip == at;
    if before.contains(Rflags::RF) && !matches!(m, Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq) && !goes_on {
        x.cpu.rflags.remove(Rflags::RF);
    }
    if m == Mnemonic::Int1 && hits != 0 {
        // Its own debug exception tells of them too.
        x.cpu.dr6 = x.cpu.dr6 & !0xf | hits;
        return Ok(());
    }
    if loads_ss(&entry.insn) {
        x.cpu.pending_debug = hits;
        return Ok(());
    }
    let step = match m {
        // These look at the flag they leave behind; software interrupts have cleared it for the handler.
        Mnemonic::Sysret | Mnemonic::Sysretq | Mnemonic::Syscall => x.cpu.rflags.contains(Rflags::TF),
        Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3 | Mnemonic::Into => false,
        // BTF: only branches that are taken.
        _ if x.cpu.msr.debugctl & BTF != 0 => {
            before.contains(Rflags::TF)
                && !goes_on
                && x.cpu.rip != at.wrapping_add(u64::from(entry.insn.len)) & context.mask
        }
        _ => before.contains(Rflags::TF),
    };
    let causes = hits | if step { DR6_BS } else { 0 };
    if causes != 0 { Err(Fault::Db(causes).into()) } else { Ok(()) }
}

/// SDM 3A 6.8.3: after MOV or POP to SS debug traps wait for the next instruction (and are then lost to its own).
fn loads_ss(i: &Insn) -> bool {
    matches!(i.iced.mnemonic(), Mnemonic::Mov | Mnemonic::Pop) && i.iced.op0_register() == Register::SS
}

/// An instruction did not complete: its exception is delivered or returned, its exit returned.
#[cold]
fn stopped(x: &mut Exec<'_>, stop: Stop, left: &mut u64) -> Result<(), Exit> {
    match stop.why() {
        Why::Exit(Exit::Halt) => {
            *left = left.saturating_sub(1);
            x.cpu.rip = x.next_rip;
            x.cpu.activity = Activity::Halted;
            x.cpu.interrupt_shadow = false;
            // It is complete: the frame of the interrupt that wakes it has no RF.
            x.cpu.rflags.remove(Rflags::RF);
            Err(Exit::Halt)
        }
        // It waits for an interrupt, which may come now: time passes.
        Why::Exit(Exit::Budget) => {
            *left = left.saturating_sub(1);
            x.cpu.interrupt_shadow = false;
            Err(Exit::Budget)
        }
        Why::Exit(exit) => Err(exit),
        Why::Fault(fault) if x.intercepts.contains(Intercepts::EXCEPTIONS) => {
            if fault.is_trap() {
                *left = left.saturating_sub(1);
                x.cpu.rip = x.next_rip;
            }
            Err(Exit::Exception(fault))
        }
        Why::Fault(fault) => {
            // A single-step trap comes after an instruction that was counted; other faults count themselves, so that a guest that only
            // faults uses its budget up too.
            if !matches!(fault, Fault::Db(_)) {
                *left = left.saturating_sub(1);
            }
            delivered(deliver(x, Event::Fault(fault)))
        }
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
