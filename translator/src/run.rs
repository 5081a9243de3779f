//! The translator as an engine: the dispatch loop.

use crate::block::Scratch;
use crate::cache::{Cache, DEFAULT_SIZE, Entry, Member, Via};
use crate::emit::{NO_TRAP, slot};
use crate::enter::{ABORTED, CAPTURED, MISS};
use crate::lower::{Leave, compare};
use crate::marks::{Home, Registers, fetch_homed};
use crate::route::Policy;
use crate::stats::Stats;
use crate::system::run::System;
use crate::trace::Sampler;
use crate::{enter, fault};
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::xsave::component;
use bivisor_emulator::cpu::{CpuState, Fault, Mode, Rflags};
use bivisor_emulator::host::signal;
use bivisor_emulator::host::stopwatch::Stopwatch;
use bivisor_emulator::host::thread::ThreadBlock;
use bivisor_emulator::interp::deliver::Event;
use bivisor_emulator::interp::{Core, Env};
use bivisor_emulator::isa::{Gpr, Insn, MAX_INSN_LEN, Seg, decode};
use bivisor_emulator::mem::{GuestMemory, PAGE_SIZE};
use bivisor_emulator::vcpu::{Board, DIRECT_CALLS, Exit, Intercepts, Kicker, Measured, Vcpu};
use iced_x86::{Code, CodeSize, Decoder, DecoderOptions, Instruction, MemoryOperand, Register};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const LOOKASIDE: usize = 256;
/// No system call is made in the cache.
static NONE_DIRECT: [u8; DIRECT_CALLS] = [1; DIRECT_CALLS];

/// The engine.
pub struct Translator {
    pub(crate) cpu: Box<CpuState>,
    /// Does what is not translated.
    pub(crate) core: Core,
    pub(crate) cache: Arc<Cache>,
    pub(crate) member: Arc<Member>,
    pub(crate) kicker: Kicker,
    /// Entries found lately, by address; good as long as the cache has this version.
    lookaside: Box<[(u64, u64)]>,
    pub(crate) version: u64,
    flushes: u64,
    /// The thread whose block was prepared.
    block: usize,
    /// [`Cache::id`] at that time.
    cache_id: u64,
    pub(crate) scratch: Scratch,
    pub(crate) stats: Stats,
    pub(crate) watch: Stopwatch,
    pub(crate) system: Option<Box<System>>,
    /// See [`Vcpu::set_direct`].
    direct: Option<&'static [u8; DIRECT_CALLS]>,
    /// Instructions of runs with a budget on the memory of a machine.
    pub(crate) counted: Option<u64>,
    /// See [`Translator::set_mirror_after`].
    pub(crate) mirror_after: Option<Duration>,
    pub(crate) sampler: Sampler,
}

impl Translator {
    /// Offers `cpu_model`; in the state after RESET, with a code cache of its own.
    ///
    /// # Errors
    /// The host's, if it gives no executable memory.
    pub fn new(cpu_model: Arc<CpuModel>) -> std::io::Result<Translator> {
        Ok(Translator::with_cache(Cache::new(cpu_model, Policy::default(), DEFAULT_SIZE)?))
    }

    /// So long a guest's mappings stay as they are before the code of its programs uses the host's page tables.
    pub const MIRROR_AFTER: Duration = Duration::from_millis(1);

    /// The code of a machine's programs uses the host's page tables after mappings have stayed the same for so long; `None`: never. Before
    /// the first run; at first it is [`Translator::MIRROR_AFTER`].
    pub fn set_mirror_after(&mut self, quiet: Option<Duration>) {
        self.mirror_after = quiet;
    }

    /// With a code cache that several virtual CPUs of one process share.
    pub fn with_cache(cache: Arc<Cache>) -> Translator {
        let cache = cache.current();
        let member = Arc::new(Member::default());
        cache.join(&member);
        Translator {
            cpu: Box::new(CpuState::reset()),
            core: Core::new(Env::new(cache.model().clone())),
            version: 0,
            flushes: 0,
            cache,
            kicker: member.kicker.clone(),
            member,
            lookaside: vec![(u64::MAX, 0); LOOKASIDE].into(),
            block: 0,
            cache_id: 0,
            scratch: Scratch::default(),
            stats: Stats::default(),
            watch: Stopwatch::default(),
            system: None,
            direct: None,
            counted: None,
            mirror_after: Some(Translator::MIRROR_AFTER),
            sampler: Sampler::default(),
        }
    }

    /// The code cache, to be shared with other virtual CPUs of the process.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// What was done so far.
    pub fn stats(&self) -> Stats {
        self.stats
    }

    /// What the engine has besides the architecture.
    pub fn env(&mut self) -> &mut Env {
        &mut self.core.env
    }

    /// May the guest, as it is, run translated? 64-bit mode at CPL 3 without single-stepping, where the host's flags and segments are
    /// the guest's.
    ///
    /// IF is 1 on the host. A single instruction may run with the guest's at 0, if it is not PUSHF.
    pub(crate) fn translatable(&self, single: bool) -> bool {
        let s = &*self.cpu;
        let fs = s.seg[Seg::Fs as usize].base;
        (single || s.rflags.contains(Rflags::IF))
            && !s.rflags.intersects(Rflags::TF | Rflags::IOPL | Rflags::VM)
            && s.mode() == Mode::Long64
            && s.cpl() == 3
            && is_canonical(fs)
            && s.xsave.mxcsr() & !0xffff == 0
            && std::is_x86_feature_detected!("xsave")
            && s.dr7 & 0xff == 0
            && !s.interrupt_shadow
    }

    /// The block at RIP, translated if it must be.
    fn find(&mut self, mem: &GuestMemory, via: Via) -> Option<Entry> {
        let rip = self.cpu.rip;
        let version = self.cache.version();
        if version != self.version {
            self.lookaside.fill((u64::MAX, 0));
            self.version = version;
            self.flushes = self.cache.flushes();
        }
        let i = lookaside(rip);
        if via == Via::Start && self.lookaside[i].0 == rip && self.lookaside[i].1 != 0 {
            return Some(Entry { host: self.lookaside[i].1, flushes: self.flushes });
        }
        let entry = self.cache.resolve(&mut { mem }, rip, via, &mut self.scratch)?;
        if entry.flushes == self.flushes {
            self.lookaside[i] = (rip, entry.host);
        }
        Some(entry)
    }

    /// Fills the slots of the calling thread's block.
    pub(crate) fn prepare(&mut self, board: Board<'_>) -> &'static ThreadBlock {
        let block = ThreadBlock::current();
        // Not where it was: another thread, or the first run in a forked child.
        if self.block != block.this as usize || !self.cache.is_current() || self.cache.id() != self.cache_id {
            let current = self.cache.current();
            signal::attach();
            block.note_tid();
            self.block = block.this as usize;
            if !Arc::ptr_eq(&current, &self.cache) {
                current.join(&self.member);
                self.cache = current;
            }
            self.cache_id = self.cache.id();
            self.version = 0;
            enter::prepare(block);
        }
        self.cache.listen(board.mem);
        self.cache.map_table(block, slot::AREA_OWNER);
        let tid = block.tid.get();
        self.member.tid.store(tid, Ordering::Relaxed);
        self.kicker.entered(tid);
        block.scratch[slot::CPU].set(&raw mut *self.cpu as u64);
        block.scratch[slot::KICK].set(self.kicker.flag_address() as u64);
        block.scratch[slot::DIRECT].set(NONE_DIRECT.as_ptr() as u64);
        block.engine_hook.set(Some(fault::hook));
        let (start, end) = self.cache.range();
        block.scratch[slot::CACHE_START].set(start);
        block.scratch[slot::CACHE_END].set(end);
        block
    }

    fn run_flat<T>(&mut self, board: Board<'_>, body: impl FnOnce(&mut Self, &ThreadBlock) -> T) -> T {
        let block = self.prepare(board);
        let exit = body(self, block);
        block.scratch[slot::CACHE_START].set(0);
        block.scratch[slot::CACHE_END].set(0);
        self.kicker.left();
        self.stats.direct += block.scratch[slot::CALLS].take();
        if self.cache.counts() {
            *self.member.stats.lock().expect("no panic under the lock") = self.stats;
        }
        exit
    }

    /// At most `most` instructions in code that is linked to nothing, up to where that is left; and how many were completed.
    fn apart(&mut self, board: Board<'_>, block: &ThreadBlock, most: u64) -> (Exit, u64) {
        loop {
            if self.kicker.requested() && self.kicker.take() {
                return (Exit::Kicked, 0);
            }
            let interrupts = self.cpu.rflags & Rflags::IF;
            let before = self.core.instructions();
            let (rip, most, may_push) = (self.cpu.rip, most as usize, !interrupts.is_empty());
            let found = match self.translatable(most == 1) {
                true => self.cache.apart(board.mem, rip, most, may_push, &mut self.scratch),
                false => None,
            };
            let Some((entry, apart)) = found else {
                let exit = self.step(board);
                return (exit, self.core.instructions() - before);
            };
            if !self.cache.go_in(&self.member, entry) {
                std::thread::yield_now();
                continue;
            }
            self.stats.entries += 1;
            let exit = enter::run(block, &mut self.cpu, entry.host);
            let next = self.left(block, exit, &mut Via::Start);
            self.member.active.store(false, Ordering::Release);
            self.cpu.rflags.replace(Rflags::IF, interrupts);
            let done = match exit {
                ABORTED => continue,
                MISS => apart.insns,
                CAPTURED => {
                    let b = &self.scratch.block;
                    b.items.iter().position(|i| b.rip(i) == self.cpu.rip).map_or(apart.insns, |n| n as u16)
                }
                id => apart.begun(id).unwrap_or(apart.insns) - u16::from(next.is_some()),
            };
            let exit = next.and_then(|act| self.act(board, act)).unwrap_or(Exit::Budget);
            return (exit, u64::from(done) + self.core.instructions() - before);
        }
    }

    /// Exactly one instruction, or all elements of a repetition.
    fn single(&mut self, board: Board<'_>, block: &ThreadBlock) -> Exit {
        loop {
            let rip = self.cpu.rip;
            match self.apart(board, block, 1) {
                (Exit::Budget, 0) if self.cpu.rip == rip => {}
                (exit, _) => return exit,
            }
        }
    }

    /// As [`Vcpu::run`] without a budget on the memory of a process, until so many blocks were entered from outside the code:
    /// [`Exit::Budget`] then. Blocks that lead to each other count as one.
    pub fn run_entries(&mut self, board: Board<'_>, entries: u64) -> Exit {
        self.run_flat(board, |t, block| t.dispatch(board, block, entries))
    }

    /// Runs until there is a reason to return.
    fn dispatch(&mut self, board: Board<'_>, block: &ThreadBlock, mut entries: u64) -> Exit {
        let mut via = Via::Start;
        loop {
            if entries == 0 {
                return Exit::Budget;
            }
            entries -= 1;
            if self.kicker.requested() && self.kicker.take() {
                return Exit::Kicked;
            }
            if self.is_to_sample(block)
                && let Some(exit) = self.sample(board, block, &mut via)
            {
                return exit;
            }
            let interrupts = self.cpu.rflags & Rflags::IF;
            let entry = match self.translatable(false) {
                true => self.find(board.mem, via),
                false => None,
            };
            if std::mem::replace(&mut via, Via::Start) == Via::Indirect {
                // It may have become larger.
                self.cache.map_table(block, slot::AREA_OWNER);
            }
            let Some(entry) = entry else {
                match self.step(board) {
                    Exit::Budget => continue,
                    exit => return exit,
                }
            };
            if !self.cache.go_in(&self.member, entry) {
                std::thread::yield_now();
                continue;
            }
            self.stats.entries += 1;
            let exit = enter::run(block, &mut self.cpu, entry.host);
            let next = self.left(block, exit, &mut via);
            self.member.active.store(false, Ordering::Release);
            self.cpu.rflags.replace(Rflags::IF, interrupts);
            if let Some(exit) = next.and_then(|act| self.act(board, act)) {
                return exit;
            }
        }
    }

    /// What leaving the cache means; still as a member that counts as inside.
    pub(crate) fn left(&mut self, block: &ThreadBlock, exit: u32, via: &mut Via) -> Option<Act> {
        self.fix_x87_pointer();
        match exit {
            ABORTED => None,
            MISS => {
                self.stats.misses += 1;
                self.cpu.rip = block.scratch[slot::TARGET].get();
                fetch_homed(&mut Mend { cpu: &mut self.cpu, block });
                *via = Via::Indirect;
                None
            }
            CAPTURED => {
                let pc = block.scratch[slot::PC].get();
                let mut regs = Mend { cpu: &mut self.cpu, block };
                let (rip, probe) = self.cache.recover(pc, &mut regs);
                self.cpu.rip = rip;
                if let Some(made) = self.made(block) {
                    return Some(made);
                }
                let trap = block.scratch[slot::TRAP].get();
                if trap == NO_TRAP {
                    self.stats.signals += 1;
                    return Some(Act::Again);
                }
                if probe {
                    // What the branch leads to cannot be fetched, or is no address, which RSP and RBP say by #SS: the interpreter
                    // says how.
                    return Some(Act::Step);
                }
                Some(Act::Trap {
                    vector: trap as u8,
                    error: block.scratch[slot::ERROR].get() as u16,
                    address: block.scratch[slot::CR2].get(),
                })
            }
            id => {
                if self.cache.home(id) == Home::Slot {
                    fetch_homed(&mut Mend { cpu: &mut self.cpu, block });
                }
                match self.cache.leave(id) {
                    Leave::To(rip) => {
                        self.stats.to_block += 1;
                        self.cpu.rip = rip;
                        *via = Via::Link(id, self.cache.flushes());
                        None
                    }
                    Leave::Step(rip) => {
                        self.cpu.rip = rip;
                        Some(Act::Step)
                    }
                    Leave::Syscall(rip, len) => {
                        self.cpu.rip = rip;
                        self.made(block).or(Some(Act::Syscall(len)))
                    }
                    Leave::Changed(rip) => {
                        self.stats.changes += 1;
                        self.cpu.rip = rip;
                        self.cache.changed(rip);
                        self.lookaside[lookaside(rip)] = (u64::MAX, 0);
                        None
                    }
                }
            }
        }
    }

    /// Was the last thing done a system call that somebody must look at?
    fn made(&mut self, block: &ThreadBlock) -> Option<Act> {
        let next_rip = block.scratch[slot::MADE].take();
        (next_rip != 0).then(|| {
            self.cpu.rip = next_rip;
            Act::Made(block.scratch[slot::NUMBER].get() as u32)
        })
    }

    /// `Some`: `run` returns.
    pub(crate) fn act(&mut self, board: Board<'_>, act: Act) -> Option<Exit> {
        let exit = match act {
            Act::Again => Exit::Budget,
            Act::Made(number) => Exit::Made { number },
            Act::Syscall(len) if self.core.intercepts.contains(Intercepts::SYSCALL) => {
                self.stats.syscalls += 1;
                let next_rip = self.cpu.rip.wrapping_add(u64::from(len));
                return Some(Exit::Intercept { what: Intercepts::SYSCALL, next_rip, vector: 0 });
            }
            Act::Syscall(_) | Act::Step => self.step(board),
            Act::Trap { vector, error, address } => self.trap(board, vector, error, address),
        };
        (exit != Exit::Budget).then_some(exit)
    }

    /// One instruction by the interpreter.
    fn step(&mut self, board: Board<'_>) -> Exit {
        self.stats.steps += 1;
        if let Some(insn) = self.known(board) {
            let prepared = self.core.prepare(&mut self.cpu, board, insn);
            return self.core.execute(&mut self.cpu, board, &prepared);
        }
        self.core.step(&mut self.cpu, board)
    }

    /// The instruction at RIP if it is one that [`without_decoder`] knows.
    fn known(&self, board: Board<'_>) -> Option<Insn> {
        let mut bytes = [0; 5];
        let looked = self.translatable(false) && board.mem.flat().is_some();
        looked.then(|| board.mem.read(self.cpu.rip, &mut bytes))??;
        let iced = without_decoder(bytes)?;
        // What can be read may still not be executed.
        let last = self.cpu.rip + iced.len() as u64 - 1;
        (board.mem.may_execute(self.cpu.rip) && board.mem.may_execute(last)).then(|| Insn::new(iced))
    }

    /// The host raised an exception for the guest's instruction at RIP.
    fn trap(&mut self, board: Board<'_>, vector: u8, error: u16, address: u64) -> Exit {
        const WRITE: u16 = 2;
        let fault = match vector {
            0 => Fault::De,
            // The host stepped: the guest has set TF with POPF. The interpreter does the step.
            1 => return self.step(board),
            6 => Fault::Ud,
            7 => Fault::Nm,
            12 => Fault::Ss(error),
            13 => Fault::Gp(error),
            14 if error & WRITE != 0 && board.mem.flat().is_some_and(|f| f.write_fault(address)) => {
                // Code was translated from that page. It is stale now, perhaps the rest of this block: one instruction, then look again.
                self.stats.code_writes += 1;
                return self.step(board);
            }
            // Behind the inline TLB nothing faults.
            14 if board.mem.flat().is_none() => return Exit::Unsupported,
            14 => Fault::Pf { addr: address, code: error },
            16 => Fault::Mf,
            // Not the guest's but ours: changed code is read where it lies.
            17 if self.may_load_its_immediate(board) => return self.step(board),
            17 => Fault::Ac,
            19 => Fault::Xm,
            _ => return Exit::Unsupported,
        };
        self.stats.faults += 1;
        if self.core.intercepts.contains(Intercepts::EXCEPTIONS) {
            return Exit::Exception(fault);
        }
        match self.core.deliver(&mut self.cpu, board, Event::Fault(fault)) {
            Ok(()) => Exit::Budget,
            Err(exit) => exit,
        }
    }

    /// Is the instruction at RIP one whose immediate operand changed code reads from memory? It has no operand there of its own.
    fn may_load_its_immediate(&self, board: Board<'_>) -> bool {
        let mut bytes = [0; MAX_INSN_LEN];
        let there = (PAGE_SIZE - self.cpu.rip % PAGE_SIZE).min(MAX_INSN_LEN as u64) as usize;
        let read =
            board.mem.read(self.cpu.rip, &mut bytes).or_else(|| board.mem.read(self.cpu.rip, &mut bytes[..there]));
        read.is_some() && decode(&bytes, 64).is_ok_and(|i| compare::may_load_immediate(&i.iced))
    }

    /// FIP, where the host keeps it, names the last x87 instruction in the cache: the guest's is meant (SDM 1 8.1.8).
    fn fix_x87_pointer(&mut self) {
        let area = &mut self.cpu.xsave;
        if area.xstate_bv() & component::X87 != 0
            && let Some(rip) = self.cache.guest_address(area.fip())
        {
            area.set_fip(rip);
        }
    }
}

fn lookaside(rip: u64) -> usize {
    (rip ^ rip >> 8) as usize % LOOKASIDE
}

fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// What to do when the thread counts as outside again.
pub(crate) enum Act {
    /// Look whether somebody wants us to stop.
    Again,
    /// A system call has been made, of this number.
    Made(u32),
    Syscall(u8),
    Step,
    Trap {
        vector: u8,
        error: u16,
        address: u64,
    },
}

struct Mend<'a> {
    cpu: &'a mut CpuState,
    block: &'a ThreadBlock,
}

impl Registers for Mend<'_> {
    fn gpr(&self, r: Gpr) -> u64 {
        self.cpu.gpr[r as usize]
    }
    fn set_gpr(&mut self, r: Gpr, v: u64) {
        self.cpu.gpr[r as usize] = v;
    }
    fn slot(&self, i: usize) -> u64 {
        self.block.scratch[i].get()
    }
    fn called(&mut self, next_rip: u64) {
        let result = self.cpu.gpr[Gpr::Rax as usize] as i64;
        if [libc::EINTR, libc::EFAULT].map(|errno| -i64::from(errno)).contains(&result) {
            self.block.scratch[slot::MADE].set(next_rip);
        }
    }
}

impl Vcpu for Translator {
    fn run(&mut self, board: Board<'_>, budget: u64) -> Exit {
        if let Some(ram) = board.mem.ram() {
            self.run_system(board, ram, budget)
        } else if budget == u64::MAX {
            self.run_flat(board, |t, block| {
                if let Some(calls) = t.direct {
                    block.scratch[slot::DIRECT].set(calls.as_ptr() as u64);
                }
                t.dispatch(board, block, u64::MAX)
            })
        } else if budget == 1 {
            self.run_flat(board, |t, block| t.single(board, block))
        } else {
            // Translated code does not count.
            self.core.run(&mut self.cpu, board, budget, Some(&self.kicker))
        }
    }

    fn run_stretch(&mut self, board: Board<'_>, most: u64) -> (Exit, u64) {
        if board.mem.ram().is_some() {
            let before = self.counted.unwrap_or(0);
            let exit = self.run(board, most.min(1));
            return (exit, self.counted.unwrap_or(before) - before);
        }
        self.run_flat(board, |t, block| t.apart(board, block, most))
    }

    fn state(&mut self) -> &mut CpuState {
        // The caller may change control registers.
        self.core.mmu.flush();
        &mut self.cpu
    }

    fn integer_state(&mut self) -> &mut CpuState {
        &mut self.cpu
    }

    fn measure(&mut self) {
        self.watch.start();
    }

    fn measured(&self) -> Measured {
        Measured {
            costs: self.watch.costs(),
            tlb_hits: self.watch.is_on().then_some(self.stats.tlb_hits),
            tlb_misses: Some(self.stats.tlb_misses + self.stats.walks),
        }
    }

    fn set_intercepts(&mut self, intercepts: Intercepts) {
        self.core.intercepts = intercepts;
        // Code that reads the host's clock or random numbers must not be copied then.
        let old = self.cache.policy();
        let policy = Policy {
            host_time: old.host_time && !intercepts.contains(Intercepts::RDTSC),
            host_random: old.host_random && !intercepts.contains(Intercepts::RDRAND),
            // Processes have it done by the interpreter.
            cpuid: old.cpuid,
        };
        if policy != old
            && let Ok(cache) = Cache::new(self.cache.model().clone(), policy, DEFAULT_SIZE)
        {
            self.cache.part(&self.member);
            cache.join(&self.member);
            self.cache = cache;
            self.cache_id = 0;
        }
    }

    fn set_direct(&mut self, calls: &'static [u8; DIRECT_CALLS]) {
        self.direct = Some(calls);
    }

    fn kicker(&self) -> Kicker {
        self.kicker.clone()
    }

    fn instructions(&self) -> Option<u64> {
        // Translated code does not count unless there is a budget.
        self.counted
    }

    fn around_fork(&mut self, fork: &mut dyn FnMut()) {
        // The child meets new code; so that not every one makes the decoder's tables anew.
        let _ = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
        self.cache.current().before_fork();
        fork();
    }

    fn survives_fork(&mut self) -> bool {
        // The next `run` gives the code cache memory of its own.
        true
    }
}

impl Drop for Translator {
    fn drop(&mut self) {
        self.cache.part(&self.member);
    }
}

/// CPUID or XGETBV, which C libraries begin with, XSAVEC or XRSTOR near the stack pointer, by which the dynamic linker looks up functions
/// that are called for the first time: a short program of which all else is kept from earlier runs needs no decoder, whose tables take
/// longer to make than everything it does.
fn without_decoder(bytes: [u8; 5]) -> Option<Instruction> {
    let at = |displacement: u8| {
        MemoryOperand::with_base_displ_size(Register::RSP, i64::from(displacement as i8), u32::from(displacement != 0))
    };
    let (mut iced, len) = match bytes {
        [0x0f, 0xa2, ..] => (Instruction::with(Code::Cpuid), 2),
        [0x0f, 0x01, 0xd0, ..] => (Instruction::with(Code::Xgetbv), 3),
        [0x0f, 0xc7, 0x64, 0x24, d] => (Instruction::with1(Code::Xsavec_mem, at(d)).ok()?, 5),
        [0x0f, 0xae, 0x6c, 0x24, d] => (Instruction::with1(Code::Xrstor_mem, at(d)).ok()?, 5),
        _ => return None,
    };
    iced.set_code_size(CodeSize::Code64);
    iced.set_len(len);
    iced.set_next_ip(len as u64);
    Some(iced)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_needs_no_decoder_is_what_the_decoder_says() {
        let all = [
            [0x0f, 0xa2, 1, 2, 3],
            [0x0f, 0x01, 0xd0, 0, 0],
            [0x0f, 0xc7, 0x64, 0x24, 0x40],
            [0x0f, 0xae, 0x6c, 0x24, 0x80],
        ];
        for bytes in all {
            let iced = without_decoder(bytes).unwrap_or_else(|| panic!("{bytes:02x?}"));
            let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
            assert!(iced.eq_all_bits(&decoded), "{iced:?}, not {decoded:?}");
        }
        assert!(without_decoder([0x0f, 0xc7, 0x6c, 0x24, 0x40]).is_none());
    }
}
