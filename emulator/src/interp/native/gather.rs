//! Gather and scatter: one access for each selected element, in order, with the progress kept in the mask when one faults
//! (SDM 2C VPGATHERDD, VPSCATTERDD).

use crate::cpu::Fault;
use crate::interp::alu::Vendor;
use crate::interp::native::masked::set_vector;
use crate::interp::native::{at, check, element};
use crate::interp::operand::effective_address;
use crate::interp::{Exec, Step, access};
use crate::isa::{Insn, MemRef, Operand, Width};
use crate::native::Needs;
use iced_x86::{EncodingKind, Instruction, Register};

/// Shape of the instruction.
struct Shape {
    /// Elements.
    count: usize,
    /// Bytes of an element.
    size: usize,
    /// Bytes of an index.
    index: usize,
}

fn shape(i: &Instruction, data: Register) -> Shape {
    let size = i.memory_size().size();
    let index = if i.is_vsib64() { 8 } else { 4 };
    // With narrow data and wide indices half of the data register is used, and the other way round.
    let count = (data.size() / size).min(i.memory_index().size() / index);
    Shape { count, size, index }
}

/// The offset of element `n`: base plus displacement plus scaled index, the index sign-extended.
fn address(x: &Exec<'_>, i: &Insn, m: &MemRef, base: u64, s: &Shape, n: usize) -> u64 {
    let z = x.cpu.xsave.zmm(i.iced.memory_index().number());
    let index = if s.index == 8 {
        u64::from_le_bytes(z[8 * n..8 * n + 8].try_into().expect("eight bytes"))
    } else {
        Width::D.sign_extend(u64::from(u32::from_le_bytes(z[4 * n..4 * n + 4].try_into().expect("four bytes"))))
    };
    at(m, base, index << m.scale)
}

/// VPGATHERDD and its kin, with the mask in a vector register (VEX) or in an opmask register (EVEX).
pub fn gather(x: &mut Exec<'_>, i: &Insn) -> Step {
    let evex = i.iced.code().encoding() == EncodingKind::EVEX;
    check(x.cpu, if evex { Needs::AVX | Needs::AVX512 } else { Needs::AVX })?;
    let Some(m) = i.mem().copied() else { return Err(Fault::Ud.into()) };
    let to = i.iced.op0_register();
    let s = shape(&i.iced, to);
    let base = effective_address(x, i, &m);
    let mut data = x.cpu.xsave.zmm(to.number());
    let mut mask = if evex {
        x.cpu.xsave.opmask(i.iced.op_mask().number())
    } else {
        let z = x.cpu.xsave.zmm(i.iced.op2_register().number());
        (0..s.count).fold(0, |b, n| b | u64::from(z[n * s.size + s.size - 1] >> 7) << n)
    };
    let before = mask;
    let mut outcome = Ok(());
    let mut reached = s.count;
    for n in 0..s.count {
        if mask >> n & 1 == 0 {
            continue;
        }
        let offset = address(x, i, &m, base, &s, n);
        match element(x, m.seg, offset, s.size as u64) {
            Ok(v) => data[n * s.size..(n + 1) * s.size].copy_from_slice(&v.to_le_bytes()[..s.size]),
            Err(stop) => {
                outcome = Err(stop);
                reached = n;
                break;
            }
        }
        mask &= !(1 << n);
    }
    if evex && outcome.is_err() && mask == before {
        return outcome;
    }
    if outcome.is_ok() {
        mask = 0;
    }
    let intel = Vendor::host() == Vendor::Intel;
    let length = to.size().max(i.iced.memory_index().size());
    // What is past the data is cleared at the end; what is past the vector length (EVEX, and VEX on Raptor Cove) already with the first element.
    if outcome.is_ok() {
        data[s.count * s.size..].fill(0);
    } else if evex || intel && mask != before {
        data[length..].fill(0);
    }
    set_vector(x, to, data);
    if evex {
        x.cpu.xsave.set_opmask(i.iced.op_mask().number(), mask);
    } else {
        // What is done is cleared; what was not reached keeps its mask. Raptor Cove spreads its sign over the element and clears what is past
        // the vector length.
        let r = i.iced.op2_register();
        let old = x.cpu.xsave.zmm(r.number());
        let mut z = if outcome.is_ok() { [0; 64] } else { old };
        z[..reached * s.size].fill(0);
        if intel {
            z[length..].fill(0);
            z.chunks_exact_mut(s.size).for_each(|e| e.fill(if e[s.size - 1] & 0x80 != 0 { 0xff } else { 0 }));
        }
        set_vector(x, r, z);
    }
    outcome
}

/// VPSCATTERDD and its kin.
pub fn scatter(x: &mut Exec<'_>, i: &Insn) -> Step {
    check(x.cpu, Needs::AVX | Needs::AVX512)?;
    let Operand::Mem(m) = i.ops[0] else { return Err(Fault::Ud.into()) };
    let from = i.iced.op1_register();
    let s = shape(&i.iced, from);
    let base = effective_address(x, i, &m);
    let data = x.cpu.xsave.zmm(from.number());
    let k = i.iced.op_mask().number();
    let mut mask = x.cpu.xsave.opmask(k);
    for n in 0..s.count {
        if mask >> n & 1 == 0 {
            continue;
        }
        let offset = address(x, i, &m, base, &s, n);
        let mut v = [0; 8];
        v[..s.size].copy_from_slice(&data[n * s.size..(n + 1) * s.size]);
        if let Err(stop) = access::write_bytes(x, m.seg, offset, &v[..s.size]) {
            x.cpu.xsave.set_opmask(k, mask);
            return Err(stop);
        }
        mask &= !(1 << n);
    }
    x.cpu.xsave.set_opmask(k, 0);
    Ok(())
}
