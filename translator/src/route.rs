//! Which way each instruction is lowered, by the facts table and the offered CPU.

use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::{Class, Sensitivity, StateImage, facts, state_image};
use bivisor_emulator::vcpu::How;
use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// A way of lowering.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// Copied; its memory operand as the memory model wants it.
    Copy,
    /// Copied, and the block ends: POPF may have set TF.
    CopyAndEnd,
    /// Jcc.
    Conditional,
    /// LOOP, LOOPcc, JrCXZ.
    Counted,
    /// JMP to a constant.
    Jump,
    /// CALL of a constant.
    Call,
    /// JMP through a register or memory.
    JumpIndirect,
    /// CALL through a register or memory.
    CallIndirect,
    /// RET.
    Return,
    /// SYSCALL: leaves.
    Syscall,
    /// A call-out to one step of the interpreter.
    Step,
}

impl Route {
    const ALL: [Route; 11] = [
        Route::Copy,
        Route::CopyAndEnd,
        Route::Conditional,
        Route::Counted,
        Route::Jump,
        Route::Call,
        Route::JumpIndirect,
        Route::CallIndirect,
        Route::Return,
        Route::Syscall,
        Route::Step,
    ];

    /// Does control not fall through to the next instruction inside the block?
    pub fn ends_block(self) -> bool {
        !matches!(self, Route::Copy | Route::Conditional)
    }
}

/// What may be copied although it reads the host's time or its random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// RDTSC and RDTSCP show the host's counter.
    pub host_time: bool,
    /// RDRAND and RDSEED are the host's.
    pub host_random: bool,
    /// CPUID need not leave.
    pub cpuid: bool,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy { host_time: true, host_random: true, cpuid: true }
    }
}

/// The routes of all instructions in 64-bit user code, each found when it is first met.
pub struct Routes {
    model: Arc<CpuModel>,
    policy: Policy,
    /// By [`Code`]: 0 is unknown, else one more than the route's number.
    table: Box<[AtomicU8]>,
}

impl Routes {
    /// For a CPU model.
    pub fn new(model: Arc<CpuModel>, policy: Policy) -> Routes {
        Routes { model, policy, table: (0..Code::values().len()).map(|_| AtomicU8::new(0)).collect() }
    }

    fn by_code(&self, code: Code) -> Route {
        let cell = &self.table[code as usize];
        match cell.load(Ordering::Relaxed) {
            0 => {
                let found = if self.model.supports(code) { route(code, self.policy) } else { Route::Step };
                cell.store(1 + found as u8, Ordering::Relaxed);
                found
            }
            n => Route::ALL[usize::from(n) - 1],
        }
    }

    /// Does the offered CPU have it?
    pub(crate) fn supports(&self, code: Code) -> bool {
        self.model.supports(code)
    }

    /// What CPUID says in a leaf that is the same for good.
    pub(crate) fn cpuid(&self, leaf: u32) -> Option<[u32; 4]> {
        let constant = self.policy.cpuid && matches!(leaf, 0 | 0x8000_0000 | 0x8000_0002..=0x8000_0004);
        constant.then(|| self.model.cpuid(&CpuState::long64(3), leaf, 0))
    }

    /// The route of an instruction in user code, whatever its operands.
    pub(crate) fn base(&self, code: Code) -> Route {
        self.by_code(code)
    }

    /// The route of an instruction.
    pub fn of(&self, iced: &Instruction) -> Route {
        let route = self.by_code(iced.code());
        match route {
            // GS is ours while guest code runs.
            _ if iced.segment_prefix() == Register::GS => Route::Step,
            // Operand size 16, which differs between vendors.
            Route::JumpIndirect | Route::CallIndirect if !is_wide(iced) => Route::Step,
            Route::Jump | Route::Call | Route::Conditional | Route::Counted
                if iced.op0_kind() != OpKind::NearBranch64 =>
            {
                Route::Step
            }
            r => r,
        }
    }
}

fn is_wide(iced: &Instruction) -> bool {
    matches!(iced.code(), Code::Jmp_rm64 | Code::Call_rm64)
}

fn route(code: Code, policy: Policy) -> Route {
    let mnemonic = code.mnemonic();
    let f = facts(code);
    match f.class {
        Class::Undefined | Class::Io => return Route::Step,
        Class::Branch => return branch(code, mnemonic),
        _ => {}
    }
    use Mnemonic as M;
    match mnemonic {
        M::Syscall => return Route::Syscall,
        // With flat segments at CPL 3 and IOPL 0 the host's instruction is the guest's.
        M::Pushf | M::Pushfq => return Route::Copy,
        M::Popf | M::Popfq => return Route::CopyAndEnd,
        // FS is the guest's while guest code runs.
        M::Rdfsbase | M::Wrfsbase => return Route::Copy,
        M::Rdtsc | M::Rdtscp if policy.host_time => return Route::Copy,
        M::Rdrand | M::Rdseed if policy.host_random => return Route::Copy,
        // They would store the host's instruction pointer, or components the guest's XCR0 does not have.
        M::Fnstenv | M::Fnsave => return Route::Step,
        m if state_image(m).is_some_and(|i| i != StateImage::Fxrstor) => return Route::Step,
        _ => {}
    }
    if f.sensitivity == Sensitivity::Innocuous && f.privilege == bivisor_emulator::isa::Privilege::Anyone {
        Route::Copy
    } else {
        Route::Step
    }
}

/// Branches of 16-bit operand size: the target is cut to 16 bits.
#[rustfmt::skip]
fn is_16_bit(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Jo_rel8_16 | C::Jno_rel8_16 | C::Jb_rel8_16 | C::Jae_rel8_16 | C::Je_rel8_16 | C::Jne_rel8_16 | C::Jbe_rel8_16 | C::Ja_rel8_16
        | C::Js_rel8_16 | C::Jns_rel8_16 | C::Jp_rel8_16 | C::Jnp_rel8_16 | C::Jl_rel8_16 | C::Jge_rel8_16 | C::Jle_rel8_16 | C::Jg_rel8_16
        | C::Jo_rel16 | C::Jno_rel16 | C::Jb_rel16 | C::Jae_rel16 | C::Je_rel16 | C::Jne_rel16 | C::Jbe_rel16 | C::Ja_rel16
        | C::Js_rel16 | C::Jns_rel16 | C::Jp_rel16 | C::Jnp_rel16 | C::Jl_rel16 | C::Jge_rel16 | C::Jle_rel16 | C::Jg_rel16
        | C::Loopne_rel8_16_CX | C::Loopne_rel8_16_ECX | C::Loopne_rel8_16_RCX | C::Loope_rel8_16_CX | C::Loope_rel8_16_ECX
        | C::Loope_rel8_16_RCX | C::Loop_rel8_16_CX | C::Loop_rel8_16_ECX | C::Loop_rel8_16_RCX
        | C::Jcxz_rel8_16 | C::Jecxz_rel8_16 | C::Jrcxz_rel8_16
        | C::Jmp_rel8_16 | C::Jmp_rel16 | C::Call_rel16 | C::Jmp_rm16 | C::Call_rm16
    )
}

fn branch(code: Code, mnemonic: Mnemonic) -> Route {
    // A 66 prefix on AMD: the target is cut to 16 bits.
    if is_16_bit(code) {
        return Route::Step;
    }
    if code.is_jcc_short_or_near() {
        return Route::Conditional;
    }
    if code.is_jcx_short() || code.is_loop() || code.is_loopcc() {
        return Route::Counted;
    }
    if code.is_jmp_short_or_near() {
        return Route::Jump;
    }
    if code.is_call_near() {
        return Route::Call;
    }
    if code.is_jmp_near_indirect() {
        return Route::JumpIndirect;
    }
    if code.is_call_near_indirect() {
        return Route::CallIndirect;
    }
    match code {
        Code::Retnq | Code::Retnq_imm16 => Route::Return,
        _ => {
            debug_assert!(mnemonic != Mnemonic::Jmp, "{code:?}");
            Route::Step
        }
    }
}

/// How the translator carries out an instruction in a flat process.
pub fn how(code: Code) -> How {
    match route(code, Policy::default()) {
        Route::Copy | Route::CopyAndEnd => How::Copied,
        Route::Syscall => How::Exits,
        Route::Step if facts(code).class == Class::Undefined => How::Unsupported,
        Route::Step => How::ByInterpreter,
        _ => How::Rewritten,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The list agrees with iced's table, which takes too long to build to be asked at run time.
    #[test]
    fn branches_of_16_bits() {
        let near = |c: &Code| {
            c.is_jcc_short_or_near()
                || c.is_jcx_short()
                || c.is_loop()
                || c.is_loopcc()
                || c.is_jmp_short_or_near()
                || c.is_call_near()
                || c.is_jmp_near_indirect()
                || c.is_call_near_indirect()
        };
        let all: Vec<Code> = Code::values().filter(near).collect();
        assert!(all.len() > 100, "{}", all.len());
        for code in all {
            assert_eq!(is_16_bit(code), code.op_code().operand_size() == 16, "{code:?}");
        }
    }
}
