//! Popek and Goldberg's theorem 1 as a computation: is every sensitive instruction privileged?

use bivisor_emulator::isa::exits::problem_of;
use bivisor_emulator::isa::{Class, Privilege, Sensitivity, facts};
use iced_x86::Code;
use serde::Serialize;

/// Under which rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Rules {
    /// 64 or 32: the width of the code.
    pub bits: u32,
    /// CR4.UMIP is set.
    pub umip: bool,
}

/// The four cases that are told apart.
pub const CASES: [Rules; 4] = [
    Rules { bits: 32, umip: false },
    Rules { bits: 32, umip: true },
    Rules { bits: 64, umip: false },
    Rules { bits: 64, umip: true },
];

/// What follows from the facts.
#[derive(Clone, Debug, Serialize)]
pub struct Verdict {
    /// Under which rules.
    pub rules: Rules,
    /// Sensitive instructions that exist.
    pub sensitive: usize,
    /// Those that run at CPL 3 without a trap.
    pub silent: Vec<String>,
    /// Those of them that are on Robin and Irvine's list.
    pub robin_irvine: Vec<&'static str>,
    /// Theorem 1: a monitor can be built on traps alone.
    pub virtualizable: bool,
}

/// Does it exist in code of that width?
pub fn exists(code: Code, bits: u32) -> bool {
    let op = code.op_code();
    facts(code).class != Class::Undefined && if bits == 64 { op.mode64() } else { op.mode32() }
}

/// Does it trap at CPL 3, IOPL 0, with CR4.TSD set and CR4.PCE clear, as a monitor would have it?
pub fn traps(privilege: Privilege, umip: bool) -> bool {
    match privilege {
        Privilege::Anyone => false,
        Privilege::Cr4Umip => umip,
        Privilege::Cpl0 | Privilege::Cpl0OrUd | Privilege::Iopl | Privilege::Cr4Tsd | Privilege::Cr4Pce => true,
    }
}

/// The name under which an instruction is counted: PUSHF, PUSHFD and PUSHFQ are one; MOV of a segment register is not MOV of a
/// control register.
pub fn name(code: Code) -> String {
    use bivisor_emulator::isa::facts::{Form, row_of};
    if let Some(p) = problem_of(code) {
        return p.name.to_string();
    }
    let name = format!("{:?}", code.mnemonic()).to_uppercase();
    let name = match name.as_str() {
        "IRETD" | "IRETQ" => "IRET".to_string(),
        "SYSRETQ" => "SYSRET".to_string(),
        "SYSEXITQ" => "SYSEXIT".to_string(),
        "INSB" | "INSW" | "INSD" => "INS".to_string(),
        "OUTSB" | "OUTSW" | "OUTSD" => "OUTS".to_string(),
        _ => name,
    };
    match row_of(code).map_or(Form::Any, |r| r.form) {
        Form::Any | Form::Str => name,
        Form::Sreg => format!("{name} seg"),
        Form::Cr => format!("{name} CR"),
        Form::Dr => format!("{name} DR"),
        Form::Far => format!("{name} far"),
    }
}

/// Looks at every instruction there is.
pub fn verdict(rules: Rules) -> Verdict {
    let mut sensitive: Vec<String> = Vec::new();
    let mut silent: Vec<String> = Vec::new();
    let mut robin_irvine = Vec::new();
    for code in Code::values().filter(|c| exists(*c, rules.bits)) {
        let f = facts(code);
        if f.sensitivity == Sensitivity::Innocuous {
            continue;
        }
        let name = name(code);
        if !traps(f.privilege, rules.umip) && !silent.contains(&name) {
            robin_irvine.extend(problem_of(code).map(|p| p.name));
            silent.push(name.clone());
        }
        if !sensitive.contains(&name) {
            sensitive.push(name);
        }
    }
    silent.sort();
    robin_irvine.sort_unstable();
    Verdict { rules, sensitive: sensitive.len(), virtualizable: silent.is_empty(), silent, robin_irvine }
}

impl Verdict {
    /// As a sentence.
    pub fn sentence(&self) -> String {
        let Rules { bits, umip } = self.rules;
        let mode = format!("{bits}-bit code, UMIP {}", if umip { "on" } else { "off" });
        if self.virtualizable {
            return format!(
                "{mode}: all {} sensitive instructions trap, so x86 is classically virtualizable.",
                self.sensitive
            );
        }
        format!(
            "{mode}: x86 is not classically virtualizable: {} of {} sensitive instructions do not trap, {} of them on Robin and \
             Irvine's list.",
            self.silent.len(),
            self.sensitive,
            self.robin_irvine.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Robin and Irvine looked at 32-bit code of a Pentium, which has no UMIP: all 18. In 64-bit code the same 18 exist in some form.
    /// UMIP makes five of them trap.
    #[test]
    fn the_list_comes_out_of_the_facts() {
        for bits in [32, 64] {
            let off = verdict(Rules { bits, umip: false });
            assert_eq!(off.robin_irvine.len(), 18, "{bits}: {:?}", off.robin_irvine);
            let on = verdict(Rules { bits, umip: true });
            let gone: Vec<_> = off.robin_irvine.iter().filter(|n| !on.robin_irvine.contains(n)).copied().collect();
            assert_eq!(gone, ["SGDT", "SIDT", "SLDT", "SMSW", "STR"], "{bits}");
            assert!(!off.virtualizable && !on.virtualizable);
        }
    }
}
