//! Cases as text, one a line, and the trials they stand for.
//!
//! ```text
//! 64 [d3 e0] "shl eax,cl" eax=1 ecx=0x21 => eax=2 cf=0 of=?
//! ```
//!
//! Bitness, bytes, what they disassemble to (checked), what differs from the default start, and what the instruction changes; all
//! else must stay. `eax=1` before the arrow sets the low half and leaves the upper half what it is; after the arrow it means what an
//! instruction's write means, the upper half cleared. Memory is `b[addr]`, `w[..]`, `d[..]`, `q[..]`; flags are `cf pf af zf sf of df`;
//! `?` is undefined by the manual: there the engines must agree with the host CPU. `fault=de`, `fault=gp(0)`, `fault=pf(addr,code)`:
//! the exception, with what it leaves changed. `rip=+n`: where RIP is then; not given, behind the instruction. `on=amd` and `on=intel`
//! before the arrow: processors differ, and those do so.
//!
//! A case runs with all status flags clear and all set. If an operand is a register where memory could be, it also runs with the
//! operand in memory: aligned, across a page end, under LOCK where allowed, partly on a page that is not there, and on a read-only
//! page.

use crate::world::{CODE, DATA, HOLE, ROM, Setup};
use bivisor_emulator::cpu::{Fault, Rflags};
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Gpr, Width};
use iced_x86::{
    Code, Decoder, DecoderOptions, Encoder, FlowControl, Formatter, Instruction, InstructionInfoFactory,
    IntelFormatter, OpAccess, OpCodeOperandKind as K, OpKind, Register,
};

/// One line.
#[derive(Clone, Debug)]
pub struct Case {
    /// `file:line`.
    pub place: String,
    /// 16, 32 or 64.
    pub bitness: u32,
    /// The instruction.
    pub code: Vec<u8>,
    /// What it says it is.
    pub text: String,
    before: Vec<(Target, Value)>,
    after: Vec<(Target, Value)>,
    fault: Option<Fault>,
    advance: Option<u64>,
    /// Whose processors do so; `None`: all.
    pub vendor: Option<Vendor>,
}

/// One run of a case: where it starts, and what must come out.
#[derive(Clone, Debug)]
pub struct Trial {
    /// `file:line`, what was done to the case.
    pub what: String,
    /// Before.
    pub setup: Setup,
    /// The exception, or none.
    pub fault: Option<Fault>,
    /// After.
    pub after: Setup,
    /// How far RIP moves.
    pub advance: u64,
    /// Undefined flags, and registers with an undefined part.
    pub undefined_flags: u64,
    /// See there.
    pub undefined_registers: [u64; 16],
    /// iced's code of the instruction.
    pub insn: Code,
}

#[derive(Clone, Copy, Debug)]
enum Target {
    /// Register, width in bits, high byte.
    Register(Gpr, u32, bool),
    Flag(Rflags),
    Memory(u64, usize),
}

#[derive(Clone, Copy, Debug)]
enum Value {
    Is(u64),
    Undefined,
}

const FLAGS: [(&str, Rflags); 7] = [
    ("cf", Rflags::CF),
    ("pf", Rflags::PF),
    ("af", Rflags::AF),
    ("zf", Rflags::ZF),
    ("sf", Rflags::SF),
    ("of", Rflags::OF),
    ("df", Rflags::DF),
];

fn number(s: &str) -> Result<u64, String> {
    let (negative, digits) = s.strip_prefix('-').map_or((false, s), |d| (true, d));
    let v = match digits.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(&hex.replace('_', ""), 16),
        None => digits.parse(),
    };
    let v = v.map_err(|_| format!("`{s}` is no number"))?;
    Ok(if negative { v.wrapping_neg() } else { v })
}

fn register(name: &str) -> Option<Target> {
    // iced calls the low byte of R8 R8L.
    let low = name.strip_prefix('r').and_then(|n| n.strip_suffix('b')).filter(|n| n.parse::<u8>().is_ok());
    let name = low.map_or(name.to_string(), |n| format!("r{n}l"));
    let all = Register::values().filter(|r| r.is_gpr());
    let found = all.into_iter().find(|r| format!("{r:?}").eq_ignore_ascii_case(&name))?;
    let high = matches!(found, Register::AH | Register::BH | Register::CH | Register::DH);
    Some(Target::Register(Gpr::from_iced(found)?, found.size() as u32 * 8, high))
}

fn target(name: &str) -> Result<Target, String> {
    if let Some((_, flag)) = FLAGS.iter().find(|(n, _)| *n == name) {
        return Ok(Target::Flag(*flag));
    }
    if let Some((size, addr)) = name.strip_suffix(']').and_then(|n| n.split_once('[')) {
        let len = match size {
            "b" => 1,
            "w" => 2,
            "d" => 4,
            "q" => 8,
            _ => return Err(format!("`{name}`: b, w, d or q")),
        };
        return Ok(Target::Memory(number(addr)?, len));
    }
    register(name).ok_or(format!("`{name}` is no register, flag or memory"))
}

fn fault(s: &str) -> Result<Fault, String> {
    let (name, arguments) = s.strip_suffix(')').and_then(|s| s.split_once('(')).unwrap_or((s, ""));
    let numbers: Vec<u64> = arguments.split(',').filter(|a| !a.is_empty()).map(number).collect::<Result<_, _>>()?;
    let code = || numbers.first().map(|c| *c as u16).ok_or(format!("`{s}`: an error code"));
    Ok(match name {
        "de" => Fault::De,
        "br" => Fault::Br,
        "ud" => Fault::Ud,
        "nm" => Fault::Nm,
        "ac" => Fault::Ac,
        "gp" => Fault::Gp(code()?),
        "ss" => Fault::Ss(code()?),
        "np" => Fault::Np(code()?),
        "pf" if numbers.len() == 2 => Fault::Pf { addr: numbers[0], code: numbers[1] as u16 },
        _ => return Err(format!("`{s}` is no fault")),
    })
}

/// The disassembly that a line must quote.
pub fn disassembly(bitness: u32, code: &[u8]) -> String {
    let mut decoder = Decoder::with_ip(bitness, code, ip(bitness), DecoderOptions::NONE);
    let insn = decoder.decode();
    if insn.len() != code.len() {
        return format!("{} of {} bytes used", insn.len(), code.len());
    }
    let mut text = String::new();
    IntelFormatter::new().format(&insn, &mut text);
    text
}

fn ip(bitness: u32) -> u64 {
    if bitness == 16 { 0 } else { CODE }
}

impl Case {
    /// Reads a line; `None` if it is empty or a comment.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(place: &str, line: &str) -> Result<Option<Case>, String> {
        let line = line.split('#').next().unwrap_or("").trim();
        if line.is_empty() {
            return Ok(None);
        }
        let (head, rest) = line.split_once('[').ok_or("no [bytes]")?;
        let (bytes, rest) = rest.split_once(']').ok_or("no [bytes]")?;
        let (_, rest) = rest.split_once('"').ok_or("no \"text\"")?;
        let (text, rest) = rest.split_once('"').ok_or("no \"text\"")?;
        let (before, after) = rest.split_once("=>").ok_or("no =>")?;
        let mut case = Case {
            place: place.into(),
            bitness: number(head.trim())? as u32,
            code: bytes
                .split_whitespace()
                .map(|b| u8::from_str_radix(b, 16).map_err(|_| format!("`{b}` is no byte")))
                .collect::<Result<_, _>>()?,
            text: text.into(),
            before: Vec::new(),
            after: Vec::new(),
            fault: None,
            advance: None,
            vendor: None,
        };
        for word in before.split_whitespace() {
            let (name, value) = word.split_once('=').ok_or(format!("`{word}`: name=value"))?;
            match (name, value) {
                ("on", "amd") => case.vendor = Some(Vendor::Amd),
                ("on", "intel") => case.vendor = Some(Vendor::Intel),
                _ => case.before.push((target(name)?, Value::Is(number(value)?))),
            }
        }
        for word in after.split_whitespace() {
            let (name, value) = word.split_once('=').ok_or(format!("`{word}`: name=value"))?;
            match (name, value) {
                ("fault", f) => case.fault = Some(fault(f)?),
                ("rip", v) => case.advance = Some(number(v.trim_start_matches('+'))?),
                (_, "?") => case.after.push((target(name)?, Value::Undefined)),
                _ => case.after.push((target(name)?, Value::Is(number(value)?))),
            }
        }
        Ok(Some(case))
    }

    /// All runs of the case.
    ///
    /// # Errors
    /// An address outside the world.
    pub fn trials(&self) -> Result<Vec<Trial>, String> {
        let mut out = Vec::new();
        for status in [0, Rflags::STATUS.bits()] {
            let trial = self.trial(status)?;
            out.extend(in_memory(&trial));
            out.push(trial);
        }
        Ok(out)
    }

    fn trial(&self, status: u64) -> Result<Trial, String> {
        let mut setup = Setup {
            bitness: self.bitness,
            code: self.code.clone(),
            count: 1,
            gpr: Gpr::ALL.map(|r| Setup::default_register(self.bitness, r)),
            rflags: status | Setup::default_flags(self.bitness),
            image: Default::default(),
        };
        for (target, value) in &self.before {
            let Value::Is(v) = *value else { return Err("`?` before the arrow".into()) };
            match *target {
                Target::Register(r, bits, high) => set_part(&mut setup.gpr[r as usize], bits, high, v),
                Target::Flag(f) if v < 2 => set_flag(&mut setup.rflags, f, v != 0),
                Target::Flag(_) => return Err("a flag is 0 or 1".into()),
                Target::Memory(addr, len) if setup.image.put(addr, len, v) => {}
                Target::Memory(addr, _) => return Err(format!("{addr:#x} is outside the world")),
            }
        }
        let mut after = setup.clone();
        let mut undefined_flags = 0;
        let mut undefined_registers = [0; 16];
        for (target, value) in &self.after {
            match (*target, *value) {
                (Target::Register(r, bits, high), Value::Is(v)) => {
                    set_part(&mut after.gpr[r as usize], bits, high, v);
                    if bits == 32 {
                        after.gpr[r as usize] &= 0xffff_ffff;
                    }
                }
                (Target::Register(r, bits, _), Value::Undefined) => {
                    undefined_registers[r as usize] = u64::MAX >> (64 - bits)
                }
                (Target::Flag(f), Value::Is(v)) if v < 2 => set_flag(&mut after.rflags, f, v != 0),
                (Target::Flag(_), Value::Is(_)) => return Err("a flag is 0 or 1".into()),
                (Target::Flag(f), Value::Undefined) => undefined_flags |= f.bits(),
                (Target::Memory(addr, len), Value::Is(v)) if after.image.put(addr, len, v) => {}
                (Target::Memory(..), _) => return Err("memory outside the world, or undefined".into()),
            }
        }
        let advance = match (self.fault, self.advance) {
            (_, Some(advance)) => advance,
            (Some(_), None) => 0,
            (None, None) => self.code.len() as u64,
        };
        let flags = if status == 0 { "flags clear" } else { "flags set" };
        Ok(Trial {
            what: format!("{}: {}, {flags}", self.place, self.text),
            insn: decode(self.bitness, &self.code).code(),
            setup,
            fault: self.fault,
            after,
            advance,
            undefined_flags,
            undefined_registers,
        })
    }
}

fn set_part(slot: &mut u64, bits: u32, high: bool, v: u64) {
    let (shift, mask) = if high { (8, 0xff) } else { (0, u64::MAX >> (64 - bits)) };
    *slot = (*slot & !(mask << shift)) | ((v & mask) << shift);
}

fn set_flag(slot: &mut u64, f: Rflags, on: bool) {
    *slot = if on { *slot | f.bits() } else { *slot & !f.bits() };
}

fn decode(bitness: u32, code: &[u8]) -> Instruction {
    Decoder::with_ip(bitness, code, ip(bitness), DecoderOptions::NONE).decode()
}

/// The same trial with its register-or-memory operand in memory, in all the ways that says something.
fn in_memory(trial: &Trial) -> Vec<Trial> {
    let insn = decode(trial.setup.bitness, &trial.setup.code);
    let Some(form) = MemoryForm::of(&insn) else { return Vec::new() };
    if matches!(trial.fault, Some(f) if f != Fault::De) {
        return Vec::new();
    }
    let len = form.width.bytes();
    let across = len / 2;
    let mut out = Vec::new();
    for addr in [DATA + 0x100, DATA + 0x1000 - across] {
        out.extend(form.moved(trial, &insn, addr, false));
    }
    if form.writes && insn.code().op_code().can_use_lock_prefix() && form.operand == 0 {
        out.extend(form.moved(trial, &insn, DATA + 0x108, true));
        out.extend(form.moved(trial, &insn, DATA + 0x1000 - across, true));
    }
    // Real mode has no pages.
    if trial.setup.bitness != 16 {
        let rights = if form.writes { 6 } else { 4 };
        out.extend(form.faulting(trial, &insn, HOLE - across, HOLE, rights));
        if form.writes {
            out.extend(form.faulting(trial, &insn, ROM + 0x10, ROM + 0x10, 7));
        }
    }
    out
}

/// An operand that is a register and could be memory.
struct MemoryForm {
    operand: u32,
    register: Register,
    width: Width,
    writes: bool,
}

impl MemoryForm {
    fn of(insn: &Instruction) -> Option<MemoryForm> {
        let op = insn.op_code();
        if insn.is_invalid() || insn.flow_control() != FlowControl::Next {
            return None;
        }
        let could = |k: &u32| {
            insn.op_kind(*k) == OpKind::Register
                && matches!(op.op_kind(*k), K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem)
        };
        let operand = (0..insn.op_count()).find(could)?;
        // The bit offset reaches beyond a memory operand, but not beyond a register.
        use iced_x86::Mnemonic as M;
        if matches!(insn.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) && insn.op1_kind() == OpKind::Register {
            return None;
        }
        let register = insn.op_register(operand);
        let width = Width::from_bytes(op.memory_size().size())?;
        let mut moved = *insn;
        in_place(&mut moved, operand, DATA);
        let mut factory = InstructionInfoFactory::new();
        if factory
            .info(&moved)
            .used_registers()
            .iter()
            .any(|u| u.register().full_register() == register.full_register())
        {
            return None;
        }
        let access = factory.info(insn).op_access(operand);
        // NOP has an operand and does nothing with it.
        if matches!(access, OpAccess::None | OpAccess::NoMemAccess) {
            return None;
        }
        let writes = !matches!(access, OpAccess::Read | OpAccess::CondRead);
        Some(MemoryForm { operand, register, width, writes })
    }

    /// The register's value, as memory holds it.
    fn value(&self, gpr: &[u64; 16]) -> Option<u64> {
        let high = matches!(self.register, Register::AH | Register::BH | Register::CH | Register::DH);
        let v = gpr[Gpr::from_iced(self.register)? as usize];
        Some(self.width.cut(if high { v >> 8 } else { v }))
    }

    fn encoded(&self, insn: &Instruction, bitness: u32, addr: u64, lock: bool) -> Option<Vec<u8>> {
        let mut moved = *insn;
        in_place(&mut moved, self.operand, if bitness == 16 { addr - DATA } else { addr });
        moved.set_memory_displ_size(bitness / 8);
        moved.set_has_lock_prefix(lock);
        let mut encoder = Encoder::new(bitness);
        encoder.encode(&moved, ip(bitness)).ok()?;
        Some(encoder.take_buffer())
    }

    fn moved(&self, trial: &Trial, insn: &Instruction, addr: u64, lock: bool) -> Option<Trial> {
        let r = Gpr::from_iced(self.register)? as usize;
        let mut t = trial.clone();
        t.setup.code = self.encoded(insn, t.setup.bitness, addr, lock)?;
        let len = self.width.bytes() as usize;
        t.setup.image.put(addr, len, self.value(&trial.setup.gpr)?);
        t.after.gpr[r] = trial.setup.gpr[r];
        t.undefined_registers[r] = 0;
        if trial.undefined_registers[r] != 0 {
            return None;
        }
        t.after.image.put(addr, len, self.value(&trial.after.gpr)?);
        if trial.fault.is_none() {
            t.advance = t.setup.code.len() as u64;
        }
        t.what += &format!(", operand {} at {addr:#x}{}", self.operand, if lock { " under LOCK" } else { "" });
        Some(t)
    }

    fn faulting(&self, trial: &Trial, insn: &Instruction, addr: u64, at: u64, code: u16) -> Option<Trial> {
        let mut t = trial.clone();
        t.setup.code = self.encoded(insn, t.setup.bitness, addr, false)?;
        t.fault = Some(Fault::Pf { addr: at, code });
        t.after = t.setup.clone();
        t.advance = 0;
        t.undefined_flags = 0;
        t.undefined_registers = [0; 16];
        t.what += &format!(", operand {} at {addr:#x}", self.operand);
        Some(t)
    }
}

fn in_place(insn: &mut Instruction, operand: u32, addr: u64) {
    insn.set_op_kind(operand, OpKind::Memory);
    insn.set_memory_base(Register::None);
    insn.set_memory_index(Register::None);
    insn.set_memory_displacement64(addr);
}
