//! What is said when the guest dies of a fault: signal, RIP, instruction and cause, in one line.

use crate::cpu::Fault;
use crate::isa;
use crate::linux::Task;
use crate::linux::strace::{say, signal_name};
use iced_x86::{Formatter, IntelFormatter};

/// One line to standard error; the guest's death by `sig` is the caller's.
pub fn report(task: &mut Task, sig: i32, why: &str) {
    let rip = task.vcpu.state().rip;
    let text =
        format!("bivisor: guest killed by {} at rip {rip:#x}: {}: {why}", signal_name(sig), instruction(task, rip));
    say(&task.process, &text);
}

/// An exception in words.
pub fn cause(fault: Fault) -> String {
    let (addr, code) = match fault {
        Fault::Pf { addr, code } => (addr, code),
        Fault::De => return "divide error".into(),
        Fault::Ud => return "invalid opcode".into(),
        Fault::Bp => return "breakpoint".into(),
        Fault::Db(_) => return "debug trap".into(),
        Fault::Gp(_) => return "general protection".into(),
        Fault::Ss(_) => return "stack fault".into(),
        Fault::Ac => return "alignment check".into(),
        Fault::Mf | Fault::Xm => return "floating-point error".into(),
        other => return format!("exception {}", other.vector()),
    };
    // The error code: P 1, W 2, I 16 (SDM 3A 4.7).
    let how = if code & 16 != 0 { "execute" } else { ["read", "write"][usize::from(code >> 1 & 1)] };
    match code & 1 != 0 {
        true => format!("may not {how} {addr:#x}"),
        false => format!("cannot {how} {addr:#x}, where nothing is mapped"),
    }
}

/// The instruction at an address, or why there is none.
fn instruction(task: &Task, rip: u64) -> String {
    let mut bytes = [0; 15];
    let readable = (1..=15).rev().find(|&n| task.process.mem().read(rip, &mut bytes[..n]).is_some()).unwrap_or(0);
    if readable == 0 {
        return "no code there".into();
    }
    match isa::decode(&bytes[..readable], 64) {
        Ok(insn) => {
            let mut text = String::new();
            let mut iced = insn.iced;
            iced.set_next_ip(rip.wrapping_add(u64::from(insn.len)));
            IntelFormatter::new().format(&iced, &mut text);
            text
        }
        Err(_) => {
            let hex: Vec<String> = bytes[..readable.min(8)].iter().map(|b| format!("{b:02x}")).collect();
            format!("bytes {}", hex.join(" "))
        }
    }
}
