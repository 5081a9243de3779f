//! The list of expected divergences, `testsuite/expected.txt`: what differs from this host's CPU, for which reason.

use super::blocks;
use super::case::{Case, Kind};
use super::outcome::{End, Outcome, Part};
use bivisor_emulator::cpu::Fault;
use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Class, Gpr, decode, facts};
use bivisor_kvm_backend::Kind as Kvm;
use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Register};

/// One line.
#[derive(Clone, Debug)]
pub struct Row {
    engines: Vec<String>,
    mnemonics: Vec<String>,
    parts: Vec<String>,
    when: String,
    /// Why.
    pub reason: String,
    /// By code: is it meant?
    codes: Vec<bool>,
}

/// The list.
#[derive(Clone, Debug)]
pub struct Expected(pub Vec<Row>);

const TEXT: &str = include_str!("../../expected.txt");

impl Default for Expected {
    /// The committed list.
    fn default() -> Expected {
        Expected::parse(TEXT).expect("a test reads it")
    }
}

fn is_x87(code: Code) -> bool {
    code.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
}

/// A group of instructions by a word in lower case, or a mnemonic.
fn is_meant(words: &[String], code: Code) -> bool {
    let mnemonic = format!("{:?}", code.mnemonic());
    words.iter().any(|w| match w.as_str() {
        "*" => true,
        "x87" => is_x87(code),
        "vector" => facts(code).class == Class::Native && !is_x87(code),
        "string" => facts(code).class == Class::String,
        "invalid" => code == Code::INVALID,
        "vex" => matches!(code.encoding(), EncodingKind::VEX | EncodingKind::EVEX),
        w => w == mnemonic.to_lowercase(),
    })
}

impl Expected {
    /// Reads a list: `engines | instructions | part | when | reason`, `#` comments.
    ///
    /// # Errors
    /// The line that is wrong.
    pub fn parse(text: &str) -> Result<Expected, String> {
        let mut rows = Vec::new();
        for line in text.lines().map(str::trim).filter(|l| !l.is_empty() && !l.starts_with('#')) {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let [engines, instructions, part, when, reason] = cells[..] else {
                return Err(format!("`{line}`: five columns"));
            };
            let list =
                |s: &str| s.split([' ', ',']).filter(|s| !s.is_empty()).map(str::to_lowercase).collect::<Vec<_>>();
            let mnemonics = list(instructions);
            let parts = list(part);
            if !parts.iter().all(|part| Part::ALL.iter().any(|p| p.name() == part)) {
                return Err(format!("`{line}`: no part {part}"));
            }
            if holds(when, None).is_none() {
                return Err(format!("`{line}`: no condition {when}"));
            }
            let codes = Code::values().map(|c| is_meant(&mnemonics, c)).collect::<Vec<_>>();
            if !codes.contains(&true) {
                return Err(format!("`{line}`: no such instruction"));
            }
            rows.push(Row {
                engines: list(engines),
                codes,
                mnemonics,
                parts,
                when: when.into(),
                reason: reason.into(),
            });
        }
        Ok(Expected(rows))
    }

    /// The row that says why `engine` may differ so.
    pub fn find(&self, engine: &str, case: &Case, part: Part, is: &Outcome, should: &Outcome) -> Option<usize> {
        // The reasons are those of single instructions.
        let single = case.kind.is_single();
        self.0.iter().position(|r| {
            (single || IN_BLOCKS.contains(&r.when.as_str()))
                && r.parts.iter().any(|p| p == part.name())
                && r.engines.iter().any(|e| e == "*" || e == engine)
                && r.codes[case.insn as usize]
                && holds(&r.when, Some((case, is, should))) == Some(true)
        })
    }
}

/// Conditions of blocks.
const IN_BLOCKS: [&str; 2] = ["in a block", "rsp by evex.x, amd"];

impl Row {
    /// The row without its reason.
    pub fn what(&self) -> String {
        format!("{} on {}: {}, {}", self.mnemonics.join(" "), self.engines.join(" "), self.parts.join(" "), self.when)
    }
}

/// Is it a VEX or EVEX instruction but for bits that must have one value?
pub fn has_reserved_bits(code: &[u8], bits: u32) -> bool {
    let mut code = code.to_vec();
    // Outside 64-bit mode V' means nothing, but with EVEX.b the decoder wants it.
    if let (32 | 16, Some(evex)) = (bits, code.iter().position(|b| *b == 0x62))
        && let Some(last) = code.get_mut(evex + 3)
    {
        *last |= 8;
    }
    let lenient = Decoder::new(bits, &code, DecoderOptions::NO_INVALID_CHECK).decode();
    matches!(lenient.op_code().encoding(), EncodingKind::VEX | EncodingKind::EVEX)
}

/// EVEX with a register operand of number 4 whose X bit is inverted: it is bit 4 of a vector register's number, and nothing of RSP's.
fn takes_rsp_by_evex_x(bytes: &[u8]) -> bool {
    let Ok(insn) = decode(bytes, 64) else { return false };
    let Some(evex) = bytes[..usize::from(insn.len)].iter().position(|b| *b == 0x62) else { return false };
    let rsp = |k: u32| insn.iced.op_register(k).full_register() == Register::RSP;
    insn.iced.encoding() == EncodingKind::EVEX && bytes[evex + 1] & 0x40 == 0 && (0..insn.iced.op_count()).any(rsp)
}

fn software_kvm() -> bool {
    bivisor_kvm_backend::host().kind == Kvm::Software
}

/// Does a condition hold? `None`: there is no such condition. With `, amd` it holds on AMD's processors only.
fn holds(when: &str, about: Option<(&Case, &Outcome, &Outcome)>) -> Option<bool> {
    let pf = |o: &Outcome| match o.end {
        End::Fault(Fault::Pf { addr, code }) => Some((addr, code)),
        _ => None,
    };
    let amd = Vendor::host() == Vendor::Amd;
    if let Some(rest) = when.strip_suffix(", amd") {
        return holds(rest, about).map(|holds| holds && amd);
    }
    Some(match (when, about) {
        (
            "always"
            | "amd"
            | "alignment check"
            | "another byte of the operand"
            | "another byte of the operand, amd"
            | "another exception"
            | "another exception, amd"
            | "another exception, at a limit"
            | "in a hypervisor"
            | "at the canonical edge"
            | "software kvm"
            | "software kvm, rsp not canonical"
            | "software kvm, another exception"
            | "software kvm, instead of #UD"
            | "software kvm, NT lost"
            | "in a block"
            | "reserved bits"
            | "rsp by evex.x"
            | "the modrm byte of fop"
            | "far call with rex.w",
            None,
        ) => true,
        ("always", _) => true,
        ("amd", _) => amd,
        ("reserved bits", Some((case, ..))) => has_reserved_bits(&case.code, case.kind.bits()),
        ("rsp by evex.x", Some((case, ..))) => {
            case.kind == Kind::Block && blocks::instructions(&case.code, 64).any(takes_rsp_by_evex_x)
        }
        // RFLAGS.AC is set at the start.
        ("alignment check", Some((case, is, should))) => {
            let ac = |o: &Outcome| o.end == End::Fault(Fault::Ac);
            case.rflags & 0x4_0000 != 0 && (ac(is) || ac(should))
        }
        // Both #PF, with the same error code but for the address.
        ("another byte of the operand, amd" | "another exception, amd", Some(_)) if !amd => false,
        ("another byte of the operand" | "another byte of the operand, amd", Some((case, is, should))) => {
            match (pf(is), pf(should)) {
                (Some(a), Some(b)) => {
                    let near = a.0.abs_diff(b.0) < 0x1000 || !case.code.is_empty() && a.0.abs_diff(b.0) < 0x2000;
                    a.1 & !2 == b.1 & !2 && near
                }
                _ => false,
            }
        }
        // Both raise one, but not the same: which comes first is the processor's choice.
        ("another exception" | "another exception, amd", Some((_, is, should))) => {
            matches!((is.end, should.end), (End::Fault(_), End::Fault(_)))
        }
        // #GP or #SS of a limit here, #PF or #AC there, in 16- and 32-bit code.
        ("another exception, at a limit", Some((case, is, should))) => {
            let limit = |o: &Outcome| matches!(o.end, End::Fault(Fault::Gp(0) | Fault::Ss(0)));
            let other = |o: &Outcome| pf(o).is_some() || o.end == End::Fault(Fault::Ac);
            case.kind.bits() != 64 && (limit(is) && other(should) || limit(should) && other(is))
        }
        // An operand that begins on the last page of the lower half and ends behind it.
        ("at the canonical edge", Some((_, is, should))) => {
            let edge = |o: &Outcome| pf(o).is_some_and(|f| (0x7fff_ffff_f000..0x8000_0000_0000).contains(&f.0));
            matches!((is.end, should.end), (End::Fault(_), End::Fault(_))) && (edge(is) || edge(should))
        }
        ("in a block", Some((case, is, should))) => {
            matches!(case.kind, Kind::Block | Kind::Block32)
                && is.xsave.fip() == should.xsave.fip()
                && is.xsave.fop() == should.xsave.fop()
        }
        ("the modrm byte of fop", Some((_, is, should))) => {
            let (a, b) = (&is.xsave, &should.xsave);
            // The opcode's three bits and the middle of the ModRM byte are the same.
            (a.fop() ^ b.fop()) & 0x738 == 0 && (a.fip(), a.fdp()) == (b.fip(), b.fdp())
        }
        ("far call with rex.w", Some((case, ..))) => {
            let opcode = case.code.windows(2).any(|w| matches!(w, [0x48..=0x4f, 0xff]));
            amd && case.insn == Code::Call_m1632 && opcode
        }
        ("software kvm", _) => software_kvm(),
        ("software kvm, rsp not canonical", Some((case, ..))) => {
            let rsp = case.gpr[Gpr::Rsp as usize];
            software_kvm() && (rsp << 16) as i64 >> 16 != rsp as i64
        }
        ("software kvm, another exception", Some((_, is, should))) => {
            software_kvm() && matches!((is.end, should.end), (End::Fault(_), End::Fault(Fault::Gp(_) | Fault::Ss(_))))
        }
        ("software kvm, instead of #UD", Some((_, is, should))) => {
            software_kvm() && matches!((is.end, should.end), (End::Fault(_), End::Fault(Fault::Ud)))
        }
        ("software kvm, NT lost", Some((_, is, should))) => {
            const NT: u64 = 1 << 14;
            software_kvm() && should.rflags ^ is.rflags == NT && should.rflags & NT != 0
        }
        ("in a hypervisor", _) => std::arch::x86_64::__cpuid(1).ecx >> 31 != 0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_list_reads_and_wrong_lines_do_not() {
        Expected::parse(TEXT).expect("the committed list");
        for wrong in
            ["a | b", "* | mov | flags | never | x", "* | mov | colour | always | x", "* | nosuch | flags | always | x"]
        {
            assert!(Expected::parse(wrong).is_err(), "{wrong}");
        }
    }
}
