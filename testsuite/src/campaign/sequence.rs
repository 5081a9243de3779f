//! Sequences for the engines beside each other on RAM: any bytes as code, at CPL 3, or at CPL 0 with sensitive instructions, edits of the page
//! tables, exceptions through an IDT and interrupts. [`super::group`] runs them.

use super::arena::{self, BASE, CODE, CODE_NX, DATA, OWN_TABLES};
use super::{blocks, encode};
use crate::random::Random;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Gpr, decode};
use iced_x86::{Code, Decoder, DecoderOptions, Mnemonic as M, OpCodeInfo};

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

impl Sequence {
    /// The same for an engine that cannot say where a number of instructions ends: to its HLT at once, and the interrupt waits from the start.
    pub fn whole(&self) -> Sequence {
        let sum = self.budgets.iter().sum();
        Sequence { budgets: vec![sum], interrupt: self.interrupt.map(|(_, vector)| (0, vector)), ..self.clone() }
    }

    /// Is it for hardware, too? Not what reads its clock, whose value nobody can repeat, or a register of the model that is not the manual's, and
    /// what a hypervisor takes for itself: VMCALL, MONITOR, MWAIT.
    pub fn is_for_hardware(&self) -> bool {
        // An address of an MSR in RCX just before.
        let known = |at: usize| {
            let load = at.checked_sub(10).map(|from| &self.code[from..at]);
            matches!(load, Some([0x48, 0xb9, _, _, 0, 0xc0, 0, 0, 0, 0]))
        };
        let fits = |at: usize| {
            decode(&self.code[at..], 64).map_or(true, |i| match i.iced.mnemonic() {
                M::Rdtsc | M::Rdtscp | M::Vmcall | M::Vmmcall | M::Monitor | M::Mwait | M::Monitorx | M::Mwaitx => {
                    false
                }
                M::Rdmsr | M::Wrmsr => known(at),
                _ => true,
            })
        };
        self.kernel && (0..self.code.len()).all(fits)
    }
}

/// Most bytes of code.
pub const ROOM: usize = 0x1000;
/// Draws sequences.
pub struct Source {
    codes: Vec<(Code, &'static OpCodeInfo)>,
}

impl Source {
    /// Of the instructions that a model has.
    pub fn new(model: &CpuModel) -> Source {
        let supported = |c: &Code| model.supports(*c) && c.op_code().mode64() && c.op_code().is_instruction();
        Source { codes: Code::values().filter(supported).map(|c| (c, c.op_code())).collect() }
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
    // Handlers go on at any byte.
    let any = (0..s.code.len()).any(|at| stores(&s.code[at..]));
    let holds = Vendor::host() == Vendor::Amd && what.starts_with("byte at ") && any;
    holds.then_some("fnstenv fnsave on bt-paged: memory, in a sequence")
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
