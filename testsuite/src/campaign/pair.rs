//! Interpreter and translator side by side on RAM: any bytes as code, at CPL 3, or at CPL 0 with sensitive instructions, edits of the page
//! tables, exceptions through an IDT and interrupts. There is no host CPU to ask: the two must agree.

use super::arena::{self, BASE, CODE, CODE_HOLE, CODE_NX, DATA, GDT, GDT_LIMIT, IDT, OWN_TABLES, TABLES, TSS};
use super::outcome::image;
use super::values::Pool;
use super::{blocks, encode};
use crate::random::Random;
use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{Attr, CpuState, Rflags, Segment, Table};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::interp::sensitive::time::TimeSource;
use bivisor_emulator::isa::{Gpr, decode};
use bivisor_emulator::mem::GuestMemory;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use bivisor_translator::Translator;
use iced_x86::{Code, Decoder, DecoderOptions, Mnemonic as M, OpCodeInfo};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// A start.
#[derive(Clone, Debug)]
pub struct Sequence {
    /// At CPL 0, exceptions through the IDT; else at CPL 3, and the first exception is the end.
    pub kernel: bool,
    /// Code at [`CODE`], at most [`ROOM`] bytes.
    pub code: Vec<u8>,
    /// General registers.
    pub gpr: [u64; 16],
    /// Flags.
    pub rflags: u64,
    /// Draws the rest: vector registers, memory.
    pub seed: u64,
    /// How many instructions at a time.
    pub budgets: Vec<u64>,
    /// An interrupt that waits from this one of the budgets on.
    pub interrupt: Option<(usize, u8)>,
}

/// Most bytes of code.
pub const ROOM: usize = 0x1000;
const NOTHING: u16 = 0xffff;

/// Ports that read a fixed pattern, and one interrupt.
struct Line(AtomicU16);

impl Bus for Line {
    fn read_port(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8 ^ 0x5a);
    }
    fn write_port(&self, _: u16, _: &[u8]) {}
    fn read_mmio(&self, gpa: u64, data: &mut [u8]) {
        data.fill((gpa >> 4) as u8 ^ 0xa5);
    }
    fn write_mmio(&self, _: u64, _: &[u8]) {}
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

/// The two engines, each with its RAM.
pub struct Pair {
    interpreter: Interpreter,
    translator: Translator,
    mem: [GuestMemory; 2],
    /// What RAM is before a sequence, without code.
    blank: Vec<u8>,
    pool: Pool,
    pool_seed: u64,
    codes: Vec<(Code, &'static OpCodeInfo)>,
    buffers: [Vec<u8>; 2],
}

impl Pair {
    /// Makes it.
    ///
    /// # Errors
    /// The host's.
    pub fn new() -> Result<Pair, String> {
        let model = Arc::new(CpuModel::host());
        let translator = Translator::new(model.clone()).map_err(|e| format!("no executable memory: {e}"))?;
        let mem = [arena::ram()?.1, arena::ram()?.1];
        let size = mem[0].ram().map_or(0, |r| r.size()) as usize;
        let mut blank = vec![0; size];
        mem[0].read(0, &mut blank).ok_or("RAM cannot be read")?;
        handlers(&mut blank);
        let supported = |c: &Code| model.supports(*c) && c.op_code().mode64() && c.op_code().is_instruction();
        Ok(Pair {
            interpreter: Interpreter::new(model.clone()),
            translator,
            mem,
            blank,
            pool: Pool::new(&mut Random::new(0)),
            pool_seed: u64::MAX,
            codes: Code::values().filter(supported).map(|c| (c, c.op_code())).collect(),
            buffers: [vec![0; size], vec![0; size]],
        })
    }

    /// Draws a sequence.
    pub fn draw(&self, r: &mut Random, kernel: bool) -> Sequence {
        let mut code = Vec::new();
        while code.is_empty() || is_own(&code) {
            code.clear();
            for _ in 0..2 + r.below(14) {
                self.piece(r, kernel, &mut code);
            }
        }
        let gpr = registers(r);
        let rflags = 2 | r.next() & 0xcd5 | if !kernel || r.once_in(2) { 0x200 } else { 0 };
        // One at a time is counted exactly; a large budget may be overshot, so a kernel runs to its HLT.
        let mut budgets = vec![1; r.below(8) as usize];
        budgets.push(if kernel { 2000 } else { 1 + r.below(200) });
        let interrupt = kernel && r.once_in(2);
        let interrupt = interrupt.then(|| (r.below(budgets.len() as u64) as usize, 32 + r.next() as u8 % 200));
        Sequence { kernel, code, gpr, rflags, seed: r.next(), budgets, interrupt }
    }

    /// Adds an instruction, or a few that belong together, or any bytes.
    pub fn piece(&self, r: &mut Random, kernel: bool, code: &mut Vec<u8>) {
        match r.below(8) {
            0..=3 if kernel => sensitive(r, code),
            7 => code.extend(&encode::wild(r)[..1 + r.below(8) as usize]),
            _ => self.instruction(r, code),
        }
    }

    fn instruction(&self, r: &mut Random, code: &mut Vec<u8>) {
        let op = r.one_of(&self.codes).1;
        let mut bytes = encode::attempt(r, op);
        let mut decoder = Decoder::with_ip(64, &bytes, 0, DecoderOptions::NONE);
        let iced = decoder.decode();
        let at = decoder.get_constant_offsets(&iced);
        if at.displacement_size() == 4 && !r.once_in(8) {
            let v = (r.below(0x100) as i32 - 0x80).to_le_bytes();
            bytes[at.displacement_offset()..][..4].copy_from_slice(&v);
        }
        // Branches stay near.
        if iced.is_jmp_short_or_near() || iced.is_jcc_short_or_near() || iced.is_call_near() {
            let n = at.immediate_size();
            let v = (r.below(60) as i64 - 24).to_le_bytes();
            bytes[at.immediate_offset()..][..n].copy_from_slice(&v[..n]);
        }
        code.extend(&bytes[..iced.len().clamp(1, 15)]);
    }

    /// Runs a sequence on both: how they differ.
    pub fn run(&mut self, s: &Sequence) -> Option<String> {
        let mut r = Random::new(s.seed);
        // A pool is costly and lasts for some sequences.
        if self.pool_seed != s.seed >> 58 {
            self.pool_seed = s.seed >> 58;
            self.pool = Pool::new(&mut Random::new(self.pool_seed));
        }
        let mut start = self.start(s);
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
        for mem in &self.mem {
            mem.write(0, image_of)?;
        }
        let time = || TimeSource::deterministic(s.seed);
        (self.interpreter.env().time, self.translator.env().time) = (time(), time());
        let intercepts = if s.kernel { Intercepts::empty() } else { Intercepts::EXCEPTIONS | Intercepts::SYSCALL };
        let mut exits = [Vec::new(), Vec::new()];
        let engines: [&mut dyn Vcpu; 2] = [&mut self.interpreter, &mut self.translator];
        for ((engine, mem), exits) in engines.into_iter().zip(&self.mem).zip(&mut exits) {
            engine.set_intercepts(intercepts);
            *engine.state() = start.clone();
            let line = Line(AtomicU16::new(NOTHING));
            for (i, budget) in s.budgets.iter().enumerate() {
                if let Some((_, vector)) = s.interrupt.filter(|(at, _)| *at == i) {
                    line.0.store(vector.into(), Ordering::Relaxed);
                }
                let exit = engine.run(Board { mem, bus: &line }, *budget);
                exits.push(exit);
                if exit != Exit::Budget && exit != Exit::Halt {
                    break;
                }
            }
        }
        self.difference(&exits, s.kernel)
    }

    fn difference(&mut self, exits: &[Vec<Exit>; 2], kernel: bool) -> Option<String> {
        let unfinished = |exits: &Vec<Exit>| exits.last() == Some(&Exit::Budget);
        if kernel && exits.iter().any(unfinished) {
            return None;
        }
        if exits[0] != exits[1] {
            let (a, b) = (self.interpreter.state().rip, self.translator.state().rip);
            return Some(format!("interp left with {:x?} at {a:#x}, bt with {:x?} at {b:#x}", exits[0], exits[1]));
        }
        let (a, b) = (self.interpreter.state(), self.translator.state());
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
        let mut same = b.clone();
        same.xsave = a.xsave.clone();
        if *a != same {
            let (a, b) = (format!("{a:x?}"), format!("{same:x?}"));
            let at = a.bytes().zip(b.bytes()).position(|(x, y)| x != y).unwrap_or(0);
            let part = |t: &str| t.chars().skip(at.saturating_sub(60)).take(120).collect::<String>();
            return Some(format!("system registers: {} / {}", part(&a), part(&b)));
        }
        for (mem, buffer) in self.mem.iter().zip(&mut self.buffers) {
            mem.read(0, buffer)?;
        }
        let [a, b] = &self.buffers;
        let at = a.iter().zip(b).position(|(x, y)| x != y)?;
        Some(format!("byte at {:#x} is {:#x} on interp, {:#x} on bt", BASE + at as u64, a[at], b[at]))
    }

    fn start(&self, s: &Sequence) -> CpuState {
        let mut c = CpuState::long64(if s.kernel { 0 } else { 3 });
        (c.rip, c.gpr, c.cr3) = (CODE, s.gpr, TABLES);
        c.rflags = Rflags::from_bits_retain(s.rflags);
        c.gdtr = Table { base: GDT, limit: GDT_LIMIT };
        c.idtr = Table { base: IDT, limit: if s.kernel { 0xfff } else { 0 } };
        c.tr = Segment { base: TSS, limit: 0x67, attr: Attr::from_bits_retain(0x8b), selector: 0x40 };
        c
    }

    /// A smaller sequence that still differs, and how.
    pub fn shrink(&mut self, mut s: Sequence, mut what: String) -> (Sequence, String) {
        let mut try_one = |s: &mut Sequence, what: &mut String, other: Sequence| {
            let found = self.run(&other);
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

/// Registers for a sequence: most of them point to data.
pub fn registers(r: &mut Random) -> [u64; 16] {
    let mut gpr = [0; 16];
    for v in &mut gpr {
        *v = if r.once_in(3) { r.edgy() } else { DATA + 0x800 + 8 * r.below(0x500) };
    }
    gpr[Gpr::Rcx as usize] = if r.once_in(2) { r.below(9) } else { gpr[1] };
    gpr[Gpr::Rsp as usize] = DATA + 0x2000 + 8 * r.below(64);
    gpr
}

/// The code of a sequence, disassembled.
pub fn text(s: &Sequence) -> String {
    blocks::text(&s.code)
}

/// What is known, by its name on the list of what was expected: Zen 4's XSAVE gives FIP, FOP and FDP only while an exception is pending, so an
/// FNSTENV or FNSAVE that the translator leaves its code for stores zeros for them, as natively behind a switch of threads.
pub fn known(s: &Sequence, what: &str) -> Option<&'static str> {
    let stores = |i: &[u8]| decode(i, 64).is_ok_and(|i| matches!(i.iced.mnemonic(), M::Fnstenv | M::Fnsave));
    let holds =
        Vendor::host() == Vendor::Amd && what.starts_with("byte at ") && blocks::instructions(&s.code, 64).any(stores);
    holds.then_some("fnstenv fnsave on bt-paged: memory, in a sequence")
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

/// MOV r64, imm.
fn load(code: &mut Vec<u8>, g: u8, v: u64) {
    code.extend([0x48 | g >> 3, 0xb8 | g & 7]);
    code.extend(v.to_le_bytes());
}

/// One or a few instructions that only a kernel may use, or that mean something else to it.
fn sensitive(r: &mut Random, code: &mut Vec<u8>) {
    let g = r.one_of(&[0u8, 3, 6, 7]);
    match r.below(18) {
        // An entry of the last level, or of the one above it, changed: present, writable, user, NX, or another page.
        0..=2 => {
            let page = r.one_of(&[DATA, DATA + 0x1000, DATA + 0x3000, CODE_NX, arena::DATA2, arena::DATA2 + 0x1000]);
            let entry = OWN_TABLES + 0x3000 + (page >> 12 & 0x1ff) * 8;
            let to = r.one_of(&[DATA, DATA + 0x1000, DATA + 0x3000, CODE, page, page]) - BASE;
            let rights = r.one_of(&[0x67, 0x65, 0x63, 0x7, 0x66, 0x167, 0x27]) | if r.once_in(4) { 1 << 63 } else { 0 };
            load(code, 0, to | rights);
            code.extend([0x48, 0xa3]);
            code.extend(entry.to_le_bytes());
            // Until it is flushed either may hold. (MOV CR3 keeps what is global.)
            load(code, 0, page);
            code.extend([0x0f, 0x01, 0x38]); // invlpg [rax]
            if r.once_in(4) {
                code.extend([0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]); // mov rax, cr3; mov cr3, rax
            }
        }
        3 => code.push(r.one_of(&[0xfa, 0xfb])),
        4 => code.push(0x9c),
        5 => {
            load(code, g, 2 | r.next() & 0x24_7fd5);
            code.extend([0x50 | g, 0x9d]);
        }
        // MOV CR0: WP, AM, TS, EM, MP; CR4: the bits that are there or not.
        6 => {
            load(code, g, 0x8005_0033 ^ (r.next() & 0x5_000e & r.next()));
            code.extend([0x0f, 0x22, 0xc0 | g]);
        }
        7 => {
            load(code, g, 0x5_0620 ^ (1 << r.below(24)));
            code.extend([0x0f, 0x22, 0xe0 | g]);
        }
        8 => {
            let cr = r.one_of(&[0u8, 2, 3, 4]);
            code.extend([0x0f, r.one_of(&[0x20, 0x22]), 0xc0 | cr << 3 | g]);
        }
        9 => code.extend([0x44, 0x0f, r.one_of(&[0x20, 0x22]), 0xc0 | g]),
        10 => code.extend([0x0f, r.one_of(&[0x21, 0x23]), 0xc0 | (r.below(8) as u8) << 3 | g]),
        11 => code.extend([0xcd, r.next() as u8]),
        12 => {
            load(
                code,
                1,
                r.one_of(&[0xc000_0080, 0xc000_0081, 0xc000_0082, 0xc000_0084, 0xc000_0100, 0xc000_0102, 0x10, 0x1b]),
            );
            code.extend([0x0f, r.one_of(&[0x30, 0x32])]);
        }
        13 => code.extend(r.one_of(&[
            [0x0f, 0x01, 0xf8],
            [0x0f, 0x06, 0x90],
            [0x0f, 0x05, 0x90],
            [0x48, 0x0f, 0x07],
            [0x0f, 0x09, 0x90],
        ])),
        14 => code.push(r.one_of(&[0xf4, 0xec, 0xee, 0xe4, 0xcc, 0xf1])),
        // A frame for IRETQ: to a place behind, sometimes to CPL 3.
        15 => {
            let user = r.once_in(3);
            let (cs, ss) = if user { (0x33, 0x2b) } else { (0x10, 0x18) };
            for v in [ss, DATA + 0x1800, 2 | r.next() & 0xed5, cs, CODE + 0x40 + r.below(0x40)] {
                load(code, 0, v);
                code.push(0x50);
            }
            code.extend([0x48, 0xcf]);
        }
        16 => {
            load(code, 0, r.one_of(&[0, 0x10, 0x18, 0x2b, 0x33, 0x08, 0x43]));
            code.extend([0x8e, 0xc0 | r.one_of(&[0u8, 2, 3, 4, 5]) << 3]);
        }
        // A store into the code that follows.
        _ => {
            load(code, 0, CODE + r.below(0x80));
            code.extend([0xc6, 0x00, r.one_of(&[0x90, 0xf4, 0xcc, 0x48, 0xc3])]);
        }
    }
}

/// Would the outcome be the machine's own (random numbers, what the host CPU keeps to itself), or depend on how an engine counts the
/// elements of a repetition?
pub fn is_own(code: &[u8]) -> bool {
    (0..code.len()).any(|at| {
        decode(&code[at..], 64).is_ok_and(|i| {
            let repeats = i.iced.has_rep_prefix() || i.iced.has_repne_prefix();
            let own = matches!(
                i.iced.mnemonic(),
                M::Rdrand | M::Rdseed | M::Xgetbv | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 | M::Rdpmc
            );
            own || repeats && i.iced.is_string_instruction()
        })
    })
}
