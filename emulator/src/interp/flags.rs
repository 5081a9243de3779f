//! Single flags and AH: CLC STC CMC CLD STD LAHF SAHF (SDM 2A, 2B). PUSHF, POPF, CLI, STI are sensitive.

use crate::cpu::Rflags;
use crate::interp::{Exec, Step, operand};
use crate::isa::{Gpr, Insn};

/// CLC.
pub fn clc(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.rflags.remove(Rflags::CF);
    Ok(())
}

/// STC.
pub fn stc(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.rflags.insert(Rflags::CF);
    Ok(())
}

/// CMC.
pub fn cmc(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.rflags.toggle(Rflags::CF);
    Ok(())
}

/// CLD.
pub fn cld(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.rflags.remove(Rflags::DF);
    Ok(())
}

/// STD.
pub fn std(x: &mut Exec<'_>, _: &Insn) -> Step {
    x.cpu.rflags.insert(Rflags::DF);
    Ok(())
}

/// SF ZF AF PF CF: what LAHF and SAHF move.
const IN_AH: Rflags = Rflags::SF.union(Rflags::ZF).union(Rflags::AF).union(Rflags::PF).union(Rflags::CF);

/// LAHF.
pub fn lahf(x: &mut Exec<'_>, _: &Insn) -> Step {
    let ah = (x.cpu.rflags & IN_AH) | Rflags::FIXED;
    operand::write_high_byte(x.cpu, Gpr::Rax, ah.bits());
    Ok(())
}

/// SAHF.
pub fn sahf(x: &mut Exec<'_>, _: &Insn) -> Step {
    let ah = Rflags::from_bits_retain(x.cpu.gpr[Gpr::Rax as usize] >> 8);
    x.cpu.rflags.replace(IN_AH, ah);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::testing::Machine;
    use crate::vcpu::Exit;

    #[test]
    fn each_changes_its_flag_only() {
        let all = Rflags::STATUS | Rflags::DF | Rflags::FIXED;
        let rows = [
            (0xf8, all, all - Rflags::CF),
            (0xf9, Rflags::FIXED, Rflags::FIXED | Rflags::CF),
            (0xf5, all, all - Rflags::CF),
            (0xf5, Rflags::FIXED, Rflags::FIXED | Rflags::CF),
            (0xfc, all, all - Rflags::DF),
            (0xfd, Rflags::FIXED, Rflags::FIXED | Rflags::DF),
            // SAHF with AH = 0: OF and DF stay; with AH = 0xff only five flags are set.
            (0x9e, all, Rflags::OF | Rflags::DF | Rflags::FIXED),
        ];
        for (opcode, before, after) in rows {
            let mut m = Machine::long64(3, &[opcode]);
            m.cpu().rflags = before;
            assert_eq!(m.run(1), Exit::Budget);
            assert_eq!(m.cpu().rflags, after, "{opcode:#x}");
        }
    }

    #[test]
    fn ah_holds_five_flags_and_bit_1() {
        let mut m = Machine::long64(3, &[0x9f]);
        m.cpu().gpr[0] = 0x1234_ff56;
        m.cpu().rflags = Rflags::FIXED | Rflags::OF | Rflags::ZF;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().gpr[0], 0x1234_4256);
        let mut m = Machine::long64(3, &[0x9e]);
        m.cpu().gpr[0] = 0xff00;
        assert_eq!(m.run(1), Exit::Budget);
        assert_eq!(m.cpu().rflags.bits(), 0xd7);
    }
}
