//! Instructions as text to bytes, for 64-bit code: each encoding that iced-x86 knows of the mnemonic is tried with the operands, and the
//! shortest is taken. Intel's syntax as the disassembler writes it: `lock add dword ptr gs:[rax+rcx*4-8], 1`.

use crate::forms;
use anyhow::{Context, Result, anyhow, bail, ensure};
use bivisor_emulator::isa::{Class, decode, facts};
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpCodeOperandKind as Kind, OpKind, Register};

/// An operand as it was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operand {
    Register(Register),
    Number(i128),
    Memory { size: Option<usize>, segment: Register, base: Register, index: Register, scale: u32, disp: i64 },
}

/// Names that the disassembler does not use, or means 16-bit code by.
const ALIASES: [(&str, &str); 17] = [
    ("popf", "popfq"),
    ("pushf", "pushfq"),
    ("iret", "iretq"),
    ("jz", "je"),
    ("jnz", "jne"),
    ("jc", "jb"),
    ("jnc", "jae"),
    ("jnae", "jb"),
    ("jnb", "jae"),
    ("jna", "jbe"),
    ("jnbe", "ja"),
    ("jnge", "jl"),
    ("jnl", "jge"),
    ("jng", "jle"),
    ("jnle", "jg"),
    ("sal", "shl"),
    ("xlat", "xlatb"),
];

/// The instruction that a name means in 64-bit code.
pub fn mnemonic(name: &str) -> Option<Mnemonic> {
    let name = name.to_ascii_lowercase();
    forms::mnemonic(ALIASES.iter().find(|(alias, _)| *alias == name).map_or(name.as_str(), |(_, real)| real))
}

/// Assembles instructions, separated by semicolons, for the address `start`.
///
/// # Errors
/// A sentence: which instruction, and what is wrong with it.
pub fn assemble(text: &str, start: u64) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    for one in text.split(';').map(str::trim).filter(|t| !t.is_empty()) {
        let ip = start + out.len() as u64;
        out.extend(instruction(one, ip).with_context(|| format!("`{one}`"))?);
    }
    ensure!(!out.is_empty(), "there is no instruction");
    Ok(out)
}

fn instruction(text: &str, ip: u64) -> Result<Vec<u8>> {
    let (mut prefix, mut rest) = (None, text);
    let (mut word, mut operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    if ["lock", "rep", "repe", "repz", "repne", "repnz"].contains(&word.to_ascii_lowercase().as_str()) {
        prefix = Some(word.to_ascii_lowercase());
        rest = operands.trim();
        (word, operands) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    }
    let mnemonic = mnemonic(word).ok_or_else(|| anyhow!("there is no instruction `{word}`"))?;
    let operands: Vec<Operand> =
        operands.split(',').map(str::trim).filter(|o| !o.is_empty()).map(operand).collect::<Result<_>>()?;
    let mut found: Vec<(Vec<u8>, usize)> = Vec::new();
    for code in Code::values().filter(|c| c.mnemonic() == mnemonic && c.op_code().mode64()) {
        if facts(code).class == Class::Undefined {
            continue;
        }
        let Some(bytes) = encode(code, &operands, prefix.as_deref(), ip) else { continue };
        let Some(done) = decode(&bytes, 64).ok().filter(|i| usize::from(i.len) == bytes.len()) else { continue };
        let size = done.iced.memory_size().size();
        let wanted = operands.iter().find_map(|o| if let Operand::Memory { size, .. } = o { *size } else { None });
        if done.iced.mnemonic() == mnemonic && wanted.is_none_or(|w| w == size || size == 0) {
            found.push((bytes, size));
        }
    }
    found.sort_by_key(|(bytes, _)| bytes.len());
    let Some((best, size)) = found.first() else { bail!("`{word}` takes no such operands in 64-bit code") };
    let registers = operands.iter().any(|o| matches!(o, Operand::Register(_)));
    let sized = operands.iter().any(|o| matches!(o, Operand::Memory { size: Some(_), .. }));
    let memory = operands.iter().any(|o| matches!(o, Operand::Memory { .. }));
    if memory && !registers && !sized && found.iter().any(|(_, s)| s != size) {
        bail!("how much memory? Say byte ptr, word ptr, dword ptr or qword ptr");
    }
    Ok(best.clone())
}

/// The bytes, if this encoding takes the operands.
fn encode(code: Code, operands: &[Operand], prefix: Option<&str>, ip: u64) -> Option<Vec<u8>> {
    let op = code.op_code();
    // String instructions and the like have operands that nobody writes.
    let strings = [Kind::seg_rSI, Kind::es_rDI, Kind::seg_rDI];
    let implied = operands.is_empty()
        && op.op_kinds().iter().any(|k| strings.contains(k))
        && op.op_kinds().iter().all(|k| implied_kind(*k).is_some());
    if op.op_count() as usize != operands.len() && !implied {
        return None;
    }
    let mut i = Instruction::default();
    i.set_code(code);
    match prefix {
        Some("lock") => i.set_has_lock_prefix(true),
        Some("repne" | "repnz") => i.set_has_repne_prefix(true),
        Some(_) => i.set_has_rep_prefix(true),
        None => {}
    }
    for n in 0..op.op_count() {
        let kind = op.op_kind(n);
        match operands.get(n as usize) {
            None => {
                let (kind, register) = implied_kind(kind)?;
                i.set_op_kind(n, kind);
                if kind == OpKind::Register {
                    i.set_op_register(n, register);
                }
            }
            Some(Operand::Register(r)) => {
                i.set_op_kind(n, OpKind::Register);
                i.set_op_register(n, *r);
            }
            Some(Operand::Number(v)) => number(&mut i, n, kind, *v)?,
            Some(Operand::Memory { segment, base, index, scale, disp, .. }) => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_segment_prefix(*segment);
                i.set_memory_base(*base);
                i.set_memory_index(*index);
                i.set_memory_index_scale(*scale);
                let absolute = *base == Register::None && *index == Register::None;
                let short = i8::try_from(*disp).is_ok() && !absolute;
                i.set_memory_displ_size(if *disp == 0 && !absolute {
                    0
                } else if short {
                    1
                } else {
                    8
                });
                i.set_memory_displacement64(*disp as u64);
            }
        }
    }
    let mut encoder = Encoder::new(64);
    encoder.encode(&i, ip).ok()?;
    Some(encoder.take_buffer())
}

/// Of an operand that is not written.
fn implied_kind(kind: Kind) -> Option<(OpKind, Register)> {
    let register = |r| Some((OpKind::Register, r));
    match kind {
        Kind::seg_rSI => Some((OpKind::MemorySegRSI, Register::None)),
        Kind::es_rDI => Some((OpKind::MemoryESRDI, Register::None)),
        Kind::seg_rDI => Some((OpKind::MemorySegRDI, Register::None)),
        Kind::al => register(Register::AL),
        Kind::ax => register(Register::AX),
        Kind::eax => register(Register::EAX),
        Kind::rax => register(Register::RAX),
        Kind::dx => register(Register::DX),
        _ => None,
    }
}

/// A number as an immediate or as the target of a branch.
fn number(i: &mut Instruction, n: u32, kind: Kind, v: i128) -> Option<()> {
    let signed = |bits: u32| -(1i128 << (bits - 1)) <= v && v < 1 << (bits - 1);
    let any = |bits: u32| -(1i128 << (bits - 1)) <= v && v < 1i128 << bits;
    let (op, fits) = match kind {
        Kind::imm8 => (OpKind::Immediate8, any(8)),
        Kind::imm8sex16 => (OpKind::Immediate8to16, signed(8)),
        Kind::imm8sex32 => (OpKind::Immediate8to32, signed(8)),
        Kind::imm8sex64 => (OpKind::Immediate8to64, signed(8)),
        Kind::imm8_const_1 => (OpKind::Immediate8, v == 1),
        Kind::imm16 => (OpKind::Immediate16, any(16)),
        Kind::imm32 => (OpKind::Immediate32, any(32)),
        Kind::imm32sex64 => (OpKind::Immediate32to64, signed(32)),
        Kind::imm64 => (OpKind::Immediate64, any(64)),
        Kind::br64_1 | Kind::br64_4 => {
            i.set_op_kind(n, OpKind::NearBranch64);
            i.set_near_branch64(u64::try_from(v).ok()?);
            return Some(());
        }
        _ => return None,
    };
    if !fits {
        return None;
    }
    i.set_op_kind(n, op);
    match op {
        OpKind::Immediate8 => i.set_immediate8(v as u8),
        OpKind::Immediate8to16 => i.set_immediate8to16(v as i16),
        OpKind::Immediate8to32 => i.set_immediate8to32(v as i32),
        OpKind::Immediate8to64 => i.set_immediate8to64(v as i64),
        OpKind::Immediate16 => i.set_immediate16(v as u16),
        OpKind::Immediate32 => i.set_immediate32(v as u32),
        OpKind::Immediate32to64 => i.set_immediate32to64(v as i64),
        _ => i.set_immediate64(v as u64),
    }
    Some(())
}

fn register(text: &str) -> Option<Register> {
    Register::values().find(|r| *r != Register::None && format!("{r:?}").eq_ignore_ascii_case(text))
}

fn parse_number(text: &str) -> Option<i128> {
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |t| (true, t.trim()));
    let lower = digits.to_ascii_lowercase();
    let hex = lower
        .strip_prefix("0x")
        .or_else(|| lower.strip_suffix('h').filter(|t| t.starts_with(|c: char| c.is_ascii_digit())));
    let v = match hex {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => lower.parse().ok()?,
    };
    Some(if negative { -i128::from(v) } else { i128::from(v) })
}

fn operand(text: &str) -> Result<Operand> {
    if let Some(r) = register(text) {
        return Ok(Operand::Register(r));
    }
    if let Some(v) = parse_number(text) {
        return Ok(Operand::Number(v));
    }
    let Some((before, inside)) = text.split_once('[') else {
        bail!("`{text}` is no register, number or [memory]");
    };
    let inside = inside.trim_end().strip_suffix(']').ok_or_else(|| anyhow!("`{text}` has no end: ]"))?;
    let (mut size, mut segment) = (None, Register::None);
    for word in before.to_ascii_lowercase().replace(':', " ").split_whitespace() {
        match word {
            "byte" => size = Some(1),
            "word" => size = Some(2),
            "dword" => size = Some(4),
            "fword" => size = Some(6),
            "qword" => size = Some(8),
            "tbyte" => size = Some(10),
            "xmmword" => size = Some(16),
            "ymmword" => size = Some(32),
            "zmmword" => size = Some(64),
            "ptr" => {}
            name => {
                let r = register(name).filter(|r| r.is_segment_register());
                segment = r.ok_or_else(|| anyhow!("`{name}` is no size and no segment register"))?;
            }
        }
    }
    let (mut base, mut index, mut scale, mut disp) = (Register::None, Register::None, 1, 0i128);
    for term in inside.replace('-', "+-").split('+').map(str::trim).filter(|t| !t.is_empty()) {
        if let Some((r, n)) = term.split_once('*') {
            index = register(r.trim()).ok_or_else(|| anyhow!("`{term}`: no register"))?;
            scale = n
                .trim()
                .parse()
                .ok()
                .filter(|n| [1, 2, 4, 8].contains(n))
                .ok_or_else(|| anyhow!("`{term}`: 1, 2, 4 or 8"))?;
        } else if let Some(r) = register(term) {
            match base {
                Register::None => base = r,
                _ => index = r,
            }
        } else {
            disp += parse_number(term).ok_or_else(|| anyhow!("`{term}` is no register and no number"))?;
        }
    }
    let disp = i64::try_from(disp)
        .or_else(|_| u64::try_from(disp).map(|d| d as i64))
        .context("the displacement is too long")?;
    Ok(Operand::Memory { size, segment, base, index, scale, disp })
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Formatter, IntelFormatter};

    fn hex(text: &str) -> String {
        let bytes = assemble(text, 0x1000).unwrap_or_else(|e| panic!("{text}: {e:#}"));
        bytes.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// Bytes by GNU as (`.intel_syntax noprefix`).
    #[test]
    fn as_the_gnu_assembler_does_it() {
        for (text, bytes) in [
            ("popf", "9d"),
            ("mov cr8, rax", "440f22c0"),
            ("in al, dx", "ec"),
            ("in eax, 0x80", "e580"),
            ("out 0x80, al", "e680"),
            ("mov ax, cs", "668cc8"),
            ("add rax, rcx", "4801c8"),
            ("add eax, 1", "83c001"),
            ("add dword ptr gs:[rax+rcx*4-8], 1", "65834488f801"),
            ("lock add dword ptr [rax], 1", "f0830001"),
            ("mov rax, [rbx]", "488b03"),
            ("sidt [rsp]", "0f010c24"),
            ("int 0x80", "cd80"),
            ("rep stosq", "f348ab"),
            ("jnz 0x1000", "75fe"),
            ("mov rax, 0x123456789abcdef0", "48b8f0debc9a78563412"),
            ("cpuid; ret", "0fa2c3"),
            ("vpaddd ymm1, ymm2, ymm3", "c5edfecb"),
            ("invlpg [rdi]", "0f013f"),
            ("iret", "48cf"),
        ] {
            assert_eq!(hex(text), bytes.replace(' ', ""), "{text}");
        }
    }

    /// What the disassembler writes of an encoding can be read again, and means the same.
    #[test]
    fn reads_what_the_disassembler_writes() {
        let all = forms::encodings(64, |c| facts(c).class != Class::Undefined);
        let (mut right, mut refused) = (0, Vec::new());
        for (bytes, insn) in all.values() {
            let mut iced = insn.iced;
            iced.set_ip(0x1000);
            iced.set_next_ip(0x1000 + bytes.len() as u64);
            let mut text = String::new();
            IntelFormatter::new().format(&iced, &mut text);
            let Ok(again) = assemble(&text, 0x1000) else {
                refused.push(text);
                continue;
            };
            let done = decode(&again, 64).expect("it is an instruction");
            let mut said = String::new();
            let mut iced = done.iced;
            iced.set_ip(0x1000);
            iced.set_next_ip(0x1000 + again.len() as u64);
            IntelFormatter::new().format(&iced, &mut said);
            if said.split_whitespace().next() == text.split_whitespace().next() {
                right += 1;
            } else {
                refused.push(format!("{text} became {said}"));
            }
        }
        assert!(right * 100 >= all.len() * 75, "{right} of {}: {refused:?}", all.len());
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, said) in [
            ("nonsense", "there is no instruction `nonsense`"),
            ("mov rax", "takes no such operands"),
            ("mov [rax], 1", "how much memory"),
            ("mov rax, [rbx", "has no end"),
            ("mov rax, what", "no register, number or"),
            ("pusha", "takes no such operands"),
        ] {
            let error = format!("{:#}", assemble(text, 0).expect_err(text));
            assert!(error.contains(said), "{text}: {error}");
        }
    }
}
