//! The campaign: every instruction that the host has, in 64-bit mode, with random states, on every engine and on the host CPU; full
//! state compared.
//!
//! | module | holds |
//! | --- | --- |
//! | [`arena`] | the pages of the cases (unsafe) |
//! | [`mod@case`] | a case |
//! | [`encode`] | bytes for an instruction |
//! | [`values`] | register values |
//! | [`aim`] | memory operands and branch targets |
//! | [`batch`] | instructions in their places, states for them |
//! | [`oracle`] | the host CPU (unsafe) |
//! | [`engine`] | the engines |
//! | [`outcome`] | what came out, and the comparison |
//! | [`tally`] | counts and divergences |
//! | [`expected`] | the list of expected divergences |
//! | [`worker`] | runs batches |
//! | [`coordinator`] | divides them among processes |
//! | [`matrix`] | the page of results |
//! | [`repro`] | a case for `bivisor exec` |

pub mod aim;
pub mod arena;
pub mod batch;
pub mod case;
pub mod coordinator;
pub mod encode;
pub mod engine;
pub mod expected;
pub mod matrix;
pub mod oracle;
pub mod outcome;
pub mod repro;
pub mod tally;
pub mod values;
pub mod worker;

use bivisor_emulator::interp::alu::Vendor;
use bivisor_emulator::isa::{Class, facts};
use iced_x86::{Code, Mnemonic as M};

/// Why no case of a campaign shows this instruction; `None`: cases do.
pub fn reason_against(code: Code) -> Option<&'static str> {
    match code.mnemonic() {
        M::Syscall | M::Sysenter | M::Int => return Some("a system call on the host"),
        M::Cpuid | M::Rdtsc | M::Rdtscp | M::Rdpid | M::Rdpmc | M::Rdrand | M::Rdseed => {
            return Some("its result is the machine's own, or differs from run to run");
        }
        M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw => {
            return Some("the host's kernel emulates it for users (UMIP)");
        }
        M::Lar | M::Lsl | M::Verr | M::Verw | M::Lfs | M::Lgs | M::Lss => {
            return Some("depends on the host's descriptor tables");
        }
        M::Rdgsbase | M::Wrgsbase => return Some("GS is the host thread's own while a case runs"),
        M::Xsaveopt | M::Xsaveopt64 => return Some("what it leaves out is the processor's choice"),
        _ => {}
    }
    if code.op_code().fwait() {
        return Some("WAIT and another instruction, which has its own cases");
    }
    if code.mnemonic() == M::Ud0 && Vendor::host() == Vendor::Amd && code != Code::Ud0 {
        return Some("this vendor's UD0 has no ModRM byte");
    }
    if facts(code).class == Class::Segment {
        let op = code.op_code();
        let from_segment = match code.mnemonic() {
            M::Mov => !matches!(op.op0_kind(), iced_x86::OpCodeOperandKind::seg_reg),
            M::Push | M::Int1 | M::Int3 | M::Swapgs | M::Rdfsbase | M::Wrfsbase => true,
            _ => false,
        };
        return (!from_segment).then_some("depends on the host's descriptor tables");
    }
    None
}
