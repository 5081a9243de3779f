//! Robin and Irvine's 18 instructions tried at CPL 3: natively, and in a guest of this host's KVM whose tables and selectors are known.

use crate::native::{self, Native, SCRATCH};
use anyhow::Result;
use bivisor_emulator::isa::exits::ROBIN_IRVINE;
use bivisor_kvm_backend::sample::{self, EXPECTED, Samples};
use serde::Serialize;

/// What an instruction does for whoever wants to virtualize it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It traps: a monitor can step in.
    Traps,
    /// The guest sees its own machine.
    Right,
    /// The guest sees the host's machine.
    Leaks,
    /// It does nothing, silently.
    Ignored,
    /// It traps, but the kernel answers with an invented value (CR4.UMIP).
    Dummy,
    /// Another exception than the architecture's.
    WrongException,
    /// KVM cannot do it and asks for help.
    NotEmulated,
}

impl Verdict {
    /// In two words.
    pub fn words(self) -> &'static str {
        match self {
            Verdict::Traps => "traps",
            Verdict::Right => "right",
            Verdict::Leaks => "leaks",
            Verdict::Ignored => "ignored",
            Verdict::Dummy => "UMIP: dummy",
            Verdict::WrongException => "wrong fault",
            Verdict::NotEmulated => "needs help",
        }
    }
}

/// One observation.
#[derive(Clone, Debug, Serialize)]
pub struct Seen {
    /// What it means.
    pub verdict: Verdict,
    /// What was seen.
    pub what: String,
}

/// One of the 18.
#[derive(Clone, Debug, Serialize)]
pub struct Tried {
    /// Robin and Irvine's name.
    pub instruction: &'static str,
    /// Their requirement that it breaks.
    pub requirement: &'static str,
    /// Why it matters.
    pub why: &'static str,
    /// At CPL 3 on the host.
    pub native: Option<Seen>,
    /// At CPL 3 in a guest.
    pub kvm: Option<Seen>,
}

/// IF, and IOPL 3.
const IF: u64 = 0x200;
const IOPL3: u64 = 0x3000;

/// What must be in RAX in a guest with [`EXPECTED`], or which exception must come.
#[derive(Clone, Copy)]
enum Right {
    Value(u64),
    Bits(u64, u64),
    Fault(u8),
}

/// What a snippet shows, natively and in the guest.
struct Snippet {
    code: Vec<u8>,
    /// RFLAGS of the guest at its start.
    rflags: u64,
    right: Right,
    /// What the host's kernel invents under UMIP (linux/arch/x86/kernel/umip.c).
    dummy: Option<u64>,
}

/// A far pointer to the instruction behind these `len` bytes, in memory at RSP, with Linux's selector of 64-bit user code.
fn far(opcode: &[u8]) -> Vec<u8> {
    // lea rax, [rip + end]; sub rsp, 16; mov [rsp], eax; mov word ptr [rsp+4], 0x33; opcode [rsp]
    let rest = [&[0x48, 0x83, 0xec, 0x10, 0x89, 0x04, 0x24, 0x66, 0xc7, 0x44, 0x24, 0x04, 0x33, 0x00], opcode].concat();
    let mut code = vec![0x48, 0x8d, 0x05];
    code.extend((rest.len() as u32).to_le_bytes());
    code.extend(rest);
    code
}

/// Does a selector of Linux's GDT pass: 1, or not: 0.
fn looks_up(opcode: &[u8], selector: u32) -> Vec<u8> {
    // mov ecx, selector; xor ebx, ebx; opcode; setz bl; mov rax, rbx
    let mut code = vec![0xb9];
    code.extend(selector.to_le_bytes());
    code.extend([0x31, 0xdb]);
    code.extend(opcode);
    code.extend([0x0f, 0x94, 0xc3, 0x48, 0x89, 0xd8]);
    code
}

fn table(opcode: &[u8]) -> Vec<u8> {
    // sub rsp, 16; opcode [rsp]; mov rax, [rsp+2]
    [&[0x48, 0x83, 0xec, 0x10], opcode, &[0x48, 0x8b, 0x44, 0x24, 0x02]].concat()
}

fn snippet(name: &str) -> Snippet {
    let (code, right, dummy) = match name {
        "SGDT" => (table(&[0x0f, 0x01, 0x04, 0x24]), Right::Value(EXPECTED.gdt), Some(0xffff_ffff_fffe_0000)),
        "SIDT" => (table(&[0x0f, 0x01, 0x0c, 0x24]), Right::Value(EXPECTED.idt), Some(0xffff_ffff_ffff_0000)),
        // The guest's LDTR is null.
        "SLDT" => (vec![0x31, 0xc0, 0x0f, 0x00, 0xc0], Right::Value(0), Some(0)),
        "STR" => (vec![0x31, 0xc0, 0x0f, 0x00, 0xc8], Right::Value(u64::from(EXPECTED.tr)), Some(0x40)),
        // PE, MP, ET, NE of the guest's CR0; TS may be set on a host.
        "SMSW" => (vec![0x31, 0xc0, 0x0f, 0x01, 0xe0], Right::Bits(0xffff, 0x33), Some(0x8005_0033)),
        "PUSHF" => (vec![0x9c, 0x58], Right::Bits(IF | IOPL3, IOPL3), None),
        // pushf; and [rsp], ~IF; popf; pushf; pop rax
        "POPF" => {
            let mut code = vec![0x9c, 0x48, 0x81, 0x24, 0x24];
            code.extend((!(IF as u32)).to_le_bytes());
            code.extend([0x9d, 0x9c, 0x58]);
            (code, Right::Bits(IF, 0), None)
        }
        "LAR" => (looks_up(&[0x0f, 0x02, 0xc1], 0x33), Right::Value(0), None),
        "LSL" => (looks_up(&[0x0f, 0x03, 0xc1], 0x33), Right::Value(0), None),
        "VERR" => (looks_up(&[0x0f, 0x00, 0xe1], 0x33), Right::Value(0), None),
        "VERW" => (looks_up(&[0x0f, 0x00, 0xe9], 0x2b), Right::Value(0), None),
        // push 0x2b; pop fs: the guest's GDT ends before it.
        "POP seg" => (vec![0x6a, 0x2b, 0x0f, 0xa1], Right::Fault(13), None),
        "PUSH seg" => (vec![0x0f, 0xa0, 0x58], Right::Value(u64::from(EXPECTED.fs)), None),
        "MOV seg" => (vec![0x31, 0xc0, 0x8c, 0xc8], Right::Value(u64::from(EXPECTED.cs)), None),
        "CALL far" => (far(&[0xff, 0x1c, 0x24]), Right::Fault(13), None),
        "JMP far" => (far(&[0xff, 0x2c, 0x24]), Right::Fault(13), None),
        // push 0x33; lea rax, [rip + 3]; push rax; retfq
        "RET far" => (vec![0x6a, 0x33, 0x48, 0x8d, 0x05, 3, 0, 0, 0, 0x50, 0x48, 0xcb], Right::Fault(13), None),
        "INT n" => (vec![0xcd, 0x21], Right::Fault(0x21), None),
        _ => unreachable!("the list has no {name}"),
    };
    let rflags = if name == "PUSHF" { IOPL3 } else { IOPL3 | IF };
    Snippet { code, rflags, right, dummy }
}

/// The code of one of the 18, to run at CPL 3.
pub fn code(name: &str) -> Vec<u8> {
    snippet(name).code
}

fn natively(native: &mut Native, name: &'static str) -> Result<Seen> {
    let s = snippet(name);
    Ok(match native.run(&s.code)? {
        native::Outcome::Exception(e) => Seen { verdict: Verdict::Traps, what: format!("{e}, a signal") },
        native::Outcome::SystemCall => Seen { verdict: Verdict::Leaks, what: "a system call of the host".into() },
        native::Outcome::Done(rax) => match name {
            _ if s.dummy == Some(rax) && has_umip() => {
                Seen { verdict: Verdict::Dummy, what: format!("the kernel answers {rax:#x}") }
            }
            "POPF" if rax & IF != 0 => Seen { verdict: Verdict::Ignored, what: "IF stays 1".into() },
            "PUSHF" => Seen { verdict: Verdict::Leaks, what: format!("RFLAGS {rax:#x}") },
            "LAR" | "LSL" | "VERR" | "VERW" => {
                Seen { verdict: Verdict::Leaks, what: format!("answers from the host's GDT: ZF {rax}") }
            }
            "POP seg" => Seen { verdict: Verdict::Leaks, what: "loads a descriptor of the host's".into() },
            "CALL far" | "JMP far" | "RET far" => {
                Seen { verdict: Verdict::Leaks, what: "goes through the host's descriptor".into() }
            }
            _ => Seen { verdict: Verdict::Leaks, what: format!("shows the host's {rax:#x}") },
        },
    })
}

/// Is CR4.UMIP in use here?
pub fn has_umip() -> bool {
    super::host::cpu_flags().iter().any(|f| f == "umip")
}

fn in_kvm(samples: &mut Samples, name: &str) -> Result<Seen> {
    let s = snippet(name);
    let seen = |verdict, what: String| Seen { verdict, what };
    Ok(match (samples.run(3, &s.code, s.rflags, false)?, s.right) {
        (sample::Outcome::Done(v), Right::Value(w)) if v == w => seen(Verdict::Right, format!("{v:#x}, the guest's")),
        (sample::Outcome::Done(v), Right::Bits(mask, w)) if v & mask == w => {
            seen(Verdict::Right, format!("{v:#x}, the guest's"))
        }
        (sample::Outcome::Done(v), _) if name == "POPF" => {
            seen(Verdict::Ignored, format!("IF stays 1 though IOPL is 3: {v:#x}"))
        }
        (sample::Outcome::Done(_), Right::Fault(_)) => {
            seen(Verdict::Leaks, "accepts a descriptor that only the host has".into())
        }
        (sample::Outcome::Done(v), _) => seen(Verdict::Leaks, format!("{v:#x}, the host's")),
        (sample::Outcome::Exception(v), Right::Fault(w)) if v == w => {
            seen(Verdict::Right, format!("vector {v:#x}, as the guest's tables say"))
        }
        (sample::Outcome::Exception(v), Right::Fault(w)) => {
            seen(Verdict::WrongException, format!("vector {v}, not {w:#x}"))
        }
        (sample::Outcome::Exception(v), _) => seen(Verdict::WrongException, format!("vector {v}")),
        (sample::Outcome::NotEmulated, _) => seen(Verdict::NotEmulated, "internal error of KVM".into()),
        (sample::Outcome::Other(what), _) => seen(Verdict::NotEmulated, what),
    })
}

/// All 18; what could not be tried at all is `None`.
pub fn all(native: Option<&mut Native>, kvm: Option<&mut Samples>) -> Vec<Tried> {
    let (mut native, mut kvm) = (native, kvm);
    ROBIN_IRVINE
        .iter()
        .map(|p| Tried {
            instruction: p.name,
            requirement: p.requirement,
            why: p.why,
            native: native.as_mut().and_then(|n| natively(n, p.name).ok()),
            kvm: kvm.as_mut().and_then(|k| in_kvm(k, p.name).ok()),
        })
        .collect()
}

const _: () = assert!(SCRATCH < 1 << 32, "far pointers have 32 bits");
