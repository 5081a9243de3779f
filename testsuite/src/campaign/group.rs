//! Engines beside each other on RAM, each with its own: the first is the judge, the others must leave the same state and memory. There is no
//! host CPU to ask.

use super::arena::{self, BASE, CODE, CODE_HOLE, CODE_NX, DATA, GDT, GDT_LIMIT, IDT, TABLES, TSS};
use super::engine::{Which, restart_time};
use super::outcome::image;
use super::sequence::{ROOM, Sequence, Source};
use super::values::Pool;
use crate::random::Random;
use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{Attr, CpuState, Rflags, Segment, Table};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Gpr, Seg, decode};
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_kvm_backend::KvmVm;
use bivisor_translator::Translator;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

const NOTHING: u16 = 0xffff;

/// Ports that read a fixed pattern, and one interrupt.
struct Line(AtomicU16);

impl Bus for Line {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8 ^ 0x5a);
    }
    fn read_mmio(&self, gpa: u64, data: &mut [u8]) {
        data.fill((gpa >> 4) as u8 ^ 0xa5);
    }
    fn interrupt_pending(&self) -> bool {
        self.0.load(Ordering::Relaxed) != NOTHING
    }
    fn take_interrupt(&self) -> Option<u8> {
        match self.0.swap(NOTHING, Ordering::Relaxed) {
            NOTHING => None,
            vector => Some(vector as u8),
        }
    }
}

/// One of the engines.
struct Contestant {
    which: Which,
    vcpu: Box<dyn Vcpu>,
    mem: GuestMemory,
    /// How each run ended.
    exits: Vec<Exit>,
}

impl Contestant {
    fn new(which: Which, model: &Arc<CpuModel>) -> Result<Contestant, String> {
        Ok(Contestant { which, vcpu: vcpu(which, model)?, mem: arena::ram()?.1, exits: Vec::new() })
    }

    /// Does it end after a number of instructions exactly, and is its clock one that repeats?
    fn counts(&self) -> bool {
        self.which != Which::Kvm
    }

    fn run(&mut self, s: &Sequence, start: &CpuState, image: &[u8]) -> Option<()> {
        self.mem.write(0, image)?;
        restart_time(&mut *self.vcpu, s.seed);
        let stops = if s.kernel { Intercepts::empty() } else { Intercepts::EXCEPTIONS | Intercepts::SYSCALL };
        self.vcpu.set_intercepts(stops);
        *self.vcpu.state() = start.clone();
        self.exits.clear();
        let line = Line(AtomicU16::new(NOTHING));
        for (i, budget) in s.budgets.iter().enumerate() {
            if let Some((_, vector)) = s.interrupt.filter(|(at, _)| *at == i) {
                line.0.store(vector.into(), Ordering::Relaxed);
            }
            let board = Board { mem: &self.mem, bus: &line };
            let mut exit = self.vcpu.run(board, if self.counts() { *budget } else { SLICE });
            // Its budget is a time: it is at its HLT soon, or never.
            for _ in 0..SLICES {
                if self.counts() || exit != Exit::Budget {
                    break;
                }
                exit = self.vcpu.run(board, SLICE);
            }
            self.exits.push(exit);
            if exit != Exit::Budget && exit != Exit::Halt {
                break;
            }
        }
        Some(())
    }
}

/// A budget of KVM's that is a millisecond, and how many of them before it hangs.
const SLICE: u64 = 1 << 22;
const SLICES: usize = 1000;

fn vcpu(which: Which, model: &Arc<CpuModel>) -> Result<Box<dyn Vcpu>, String> {
    Ok(match which {
        Which::Interp | Which::InterpPaged => Box::new(Interpreter::new(model.clone())),
        Which::Bt | Which::BtPaged => {
            Box::new(Translator::new(model.clone()).map_err(|e| format!("no executable memory: {e}"))?)
        }
        Which::Kvm => Box::new(KvmVm::new(model.clone())?.vcpu()),
    })
}

/// Can KVM run a kernel's sequences here? Only hardware holds what the architecture says at CPL 0.
///
/// # Errors
/// A sentence: why it cannot.
pub fn kvm_for_kernels() -> Result<(), String> {
    let host = bivisor_kvm_backend::host();
    if host.usable_for_machine { Ok(()) } else { Err(host.reason.clone()) }
}

/// What an engine made of a sequence: its name in reports, and how it differs from the judge, if it does.
pub type Verdict = (Which, Option<String>);

/// The engines.
pub struct Group {
    engines: Vec<Contestant>,
    model: Arc<CpuModel>,
    source: Source,
    /// What RAM is before a sequence, without code.
    blank: Vec<u8>,
    pool: Pool,
    pool_seed: u64,
    buffers: [Vec<u8>; 2],
}

impl Group {
    /// Interpreter, the judge, and translator.
    ///
    /// # Errors
    /// The host's.
    pub fn new() -> Result<Group, String> {
        Group::of(&[Which::InterpPaged, Which::BtPaged])
    }

    /// With these engines, of which the first is the judge and counts its instructions.
    ///
    /// # Errors
    /// The host's: one of them is not to be had.
    pub fn of(which: &[Which]) -> Result<Group, String> {
        let model = Arc::new(CpuModel::host());
        let engines = which.iter().map(|w| Contestant::new(*w, &model)).collect::<Result<Vec<_>, _>>()?;
        let judge = engines.first().filter(|e| e.counts()).ok_or("a judge is needed")?;
        let size = judge.mem.ram().map_or(0, |r| r.size()) as usize;
        let mut blank = vec![0; size];
        judge.mem.read(0, &mut blank).ok_or("RAM cannot be read")?;
        handlers(&mut blank);
        Ok(Group {
            engines,
            source: Source::new(&model),
            model,
            blank,
            pool: Pool::new(&mut Random::new(0)),
            pool_seed: u64::MAX,
            buffers: [vec![0; size], vec![0; size]],
        })
    }

    /// Draws sequences.
    pub fn source(&self) -> &Source {
        &self.source
    }

    /// How the second engine differs from the judge, which is enough where there are two.
    pub fn difference(&mut self, s: &Sequence) -> Option<String> {
        self.run(s).into_iter().find_map(|(_, what)| what)
    }

    /// Runs a sequence on all engines that it is for: how each differs from the judge. None if the judge does not come to an end.
    pub fn run(&mut self, s: &Sequence) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for counts in [true, false] {
            let suits = |e: &Contestant| e.counts() == counts && (counts || s.is_for_hardware());
            let chosen: Vec<usize> = (1..self.engines.len()).filter(|i| suits(&self.engines[*i])).collect();
            if chosen.is_empty() {
                continue;
            }
            let s = if counts { s.clone() } else { s.whole() };
            let start = self.prepare(&s);
            let image = std::mem::take(&mut self.buffers[0]);
            self.engines[0].run(&s, &start, &image);
            for i in &chosen {
                if !counts {
                    // The tables were written from outside: a processor that has run may remember what they said.
                    match vcpu(self.engines[*i].which, &self.model) {
                        Ok(vcpu) => self.engines[*i].vcpu = vcpu,
                        Err(why) => verdicts.push((self.engines[*i].which, Some(why))),
                    }
                }
                self.engines[*i].run(&s, &start, &image);
            }
            self.buffers[0] = image;
            for i in chosen {
                let unfinished = |e: &Contestant| s.kernel && e.exits.last() == Some(&Exit::Budget);
                if unfinished(&self.engines[0]) || counts && unfinished(&self.engines[i]) {
                    verdicts.push((self.engines[i].which, None));
                    continue;
                }
                verdicts.push((self.engines[i].which, self.compare(i)));
            }
        }
        verdicts
    }

    /// The state at the start; memory is in the first buffer.
    fn prepare(&mut self, s: &Sequence) -> CpuState {
        let mut r = Random::new(s.seed);
        // A pool is costly and lasts for some sequences.
        if self.pool_seed != s.seed >> 58 {
            self.pool_seed = s.seed >> 58;
            self.pool = Pool::new(&mut Random::new(self.pool_seed));
        }
        let mut start = start(s);
        self.pool.fill(&mut r, &mut start.xsave);
        let image_of = &mut self.buffers[0];
        image_of.copy_from_slice(&self.blank);
        for (page, len) in [(DATA, 0x5000), (arena::DATA2, 0x2000)] {
            let from = (page - BASE) as usize;
            for chunk in image_of[from..from + len].chunks_exact_mut(64) {
                chunk.copy_from_slice(self.pool.line(&mut r));
            }
        }
        let at = (CODE - BASE) as usize;
        image_of[at..at + 0x2000].fill(0xf4);
        let n = s.code.len().min(ROOM);
        image_of[at..at + n].copy_from_slice(&s.code[..n]);
        start
    }

    /// How engine `i` differs from the judge.
    fn compare(&mut self, i: usize) -> Option<String> {
        let (first, rest) = self.engines.split_first_mut()?;
        let other = &mut rest[i - 1];
        let names = (first.which.name(), other.which.name());
        let hardware = !other.counts();
        if first.exits != other.exits {
            let (a, b) = (first.vcpu.state().rip, other.vcpu.state().rip);
            let (x, y) = (&first.exits, &other.exits);
            return Some(format!("{} left with {x:x?} at {a:#x}, {} with {y:x?} at {b:#x}", names.0, names.1));
        }
        let (a, b) = (first.vcpu.state(), other.vcpu.state());
        if (a.rip, a.gpr, a.rflags) != (b.rip, b.gpr, b.rflags) {
            let names = Gpr::NAMES.iter().zip(a.gpr.iter().zip(&b.gpr)).filter(|(_, (x, y))| x != y);
            let gpr: Vec<String> = names.map(|(n, (x, y))| format!("{n} {x:#x} {y:#x}")).collect();
            let (f, g) = (a.rflags.bits(), b.rflags.bits());
            return Some(format!("RIP {:#x} {:#x}, flags {f:#x} {g:#x}, {}", a.rip, b.rip, gpr.join(", ")));
        }
        // As expected.txt says of blocks: behind an x87 instruction without a memory operand Zen 4 loses FDP, sooner or later.
        let lost = Vendor::host() == Vendor::Amd && (a.xsave.fop(), a.xsave.fip()) == (b.xsave.fop(), b.xsave.fip());
        if lost && a.xsave.fdp() != b.xsave.fdp() {
            let fdp = a.xsave.fdp();
            b.xsave.set_fdp(fdp);
        }
        if let Some((_, what)) = image(&a.xsave, &b.xsave) {
            return Some(what);
        }
        let (a, mut same) = if hardware { (visible(a), visible(b)) } else { (a.clone(), b.clone()) };
        same.xsave = a.xsave.clone();
        if a != same {
            let (a, b) = (format!("{a:x?}"), format!("{same:x?}"));
            let at = a.bytes().zip(b.bytes()).position(|(x, y)| x != y).unwrap_or(0);
            let part = |t: &str| t.chars().skip(at.saturating_sub(60)).take(120).collect::<String>();
            return Some(format!("system registers: {} / {}", part(&a), part(&b)));
        }
        first.mem.read(0, &mut self.buffers[0])?;
        other.mem.read(0, &mut self.buffers[1])?;
        let [a, b] = &self.buffers;
        let at = a.iter().zip(b).position(|(x, y)| x != y)?;
        Some(format!("byte at {:#x} is {:#x} on {}, {:#x} on {}", BASE + at as u64, a[at], names.0, b[at], names.1))
    }

    /// A smaller sequence on which this engine still differs, and how.
    pub fn shrink(&mut self, which: Which, mut s: Sequence, mut what: String) -> (Sequence, String) {
        let mut try_one = |s: &mut Sequence, what: &mut String, other: Sequence| {
            let found = self.run(&other).into_iter().find_map(|(w, what)| what.filter(|_| w == which));
            if let Some(found) = found {
                (*s, *what) = (other, found);
                return true;
            }
            false
        };
        loop {
            let before = (s.code.len(), s.budgets.len(), s.interrupt);
            if s.interrupt.is_some() {
                let other = Sequence { interrupt: None, ..s.clone() };
                try_one(&mut s, &mut what, other);
            }
            let sum = s.budgets.iter().sum();
            if s.budgets.len() > 1 {
                let other = Sequence { budgets: vec![sum], interrupt: s.interrupt.map(|i| (0, i.1)), ..s.clone() };
                try_one(&mut s, &mut what, other);
            }
            // Without an instruction; with NOPs in its place.
            let mut at = 0;
            while at < s.code.len() {
                let len = decode(&s.code[at..], 64).map_or(1, |i| usize::from(i.len)).min(s.code.len() - at);
                let mut without = s.clone();
                without.code.drain(at..at + len);
                let mut nops = s.clone();
                nops.code[at..at + len].fill(0x90);
                let shorter = try_one(&mut s, &mut what, without);
                if !shorter && s.code[at..at + len].iter().any(|b| *b != 0x90) {
                    try_one(&mut s, &mut what, nops);
                }
                at += if shorter { 0 } else { len };
            }
            if (s.code.len(), s.budgets.len(), s.interrupt) == before {
                return (s, what);
            }
        }
    }
}

/// Registers at the start.
fn start(s: &Sequence) -> CpuState {
    let mut c = CpuState::long64(if s.kernel { 0 } else { 3 });
    (c.rip, c.gpr, c.cr3) = (CODE, s.gpr, TABLES);
    c.rflags = Rflags::from_bits_retain(s.rflags);
    c.gdtr = Table { base: GDT, limit: GDT_LIMIT };
    c.idtr = Table { base: IDT, limit: if s.kernel { 0xfff } else { 0 } };
    c.tr = Segment { base: TSS, limit: 0x67, attr: Attr::from_bits_retain(0x8b), selector: 0x40 };
    c
}

/// What software can see of a state: not what a processor holds of a segment that is unusable, and not its clock.
fn visible(s: &CpuState) -> CpuState {
    let mut s = s.clone();
    s.msr.tsc_offset = 0;
    s.ss_shadow &= s.interrupt_shadow;
    for seg in [Seg::Es, Seg::Ss, Seg::Ds, Seg::Fs, Seg::Gs] {
        let Segment { base, selector, .. } = s.seg[seg as usize];
        if selector < 4 {
            let based = matches!(seg, Seg::Fs | Seg::Gs);
            let (limit, attr) = (0, Attr::empty());
            s.seg[seg as usize] = Segment { base: if based { base } else { 0 }, limit, attr, selector };
        }
    }
    s
}

/// The IDT, the handlers, the TSS. A handler goes on one byte behind what it was told.
fn handlers(blank: &mut [u8]) {
    let at = |linear: u64| -> usize {
        match linear {
            IDT => arena::IDT_AT,
            TSS => arena::TSS_AT,
            other => (other - BASE) as usize,
        }
    };
    // add rsp, 8 (over the error code); inc qword [rsp]; iretq
    let handler = [0x48, 0x83, 0xc4, 8, 0x48, 0xff, 0x04, 0x24, 0x48, 0xcf];
    blank[at(CODE_HOLE)..][..handler.len()].copy_from_slice(&handler);
    blank[at(CODE_NX)..][..0x10].fill(0xf4);
    for vector in 0..256u64 {
        let target = CODE_HOLE + if matches!(vector, 8 | 10..=14 | 17) { 0 } else { 4 };
        let dpl = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
        let low = target & 0xffff | 0x10 << 16 | (0x8e00 | dpl << 13) << 32 | (target >> 16 & 0xffff) << 48;
        let gate = at(IDT) + 16 * vector as usize;
        blank[gate..gate + 8].copy_from_slice(&low.to_le_bytes());
        blank[gate + 8..gate + 16].copy_from_slice(&(target >> 32).to_le_bytes());
    }
    blank[at(TSS) + 4..][..8].copy_from_slice(&(TSS + 0xff0).to_le_bytes());
}
