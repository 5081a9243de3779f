//! MOVS STOS LODS CMPS SCAS and their repetition (SDM 2B REP; 1 7.3.9).
//!
//! Each element is committed before the next begins: a fault leaves RIP at the instruction and rCX, rSI, rDI at the element that
//! faulted. A long repetition returns to the loop now and then with RIP still at the instruction, so that interrupts and kicks get in.

use crate::cpu::Rflags;
use crate::interp::alu::Vendor;
use crate::interp::{Exec, Step, Stop, access, alu};
use crate::isa::{Gpr, Insn, Seg, Width};
use crate::mem::{Access, PAGE_SIZE};
use iced_x86::{Mnemonic, OpKind};

/// Elements done before the loop gets a look.
const BATCH: u64 = 4096;

/// Operand and address width, source segment, step of the indices.
struct Form {
    w: Width,
    address: Width,
    source: Seg,
    step: u64,
}

impl Form {
    fn of(x: &Exec<'_>, i: &Insn) -> Form {
        let kinds = [i.iced.op_kind(0), i.iced.op_kind(1)];
        let has = |of: &[OpKind]| kinds.iter().any(|k| of.contains(k));
        let address = if has(&[OpKind::MemoryESDI, OpKind::MemorySegSI]) {
            Width::W
        } else if has(&[OpKind::MemoryESEDI, OpKind::MemorySegESI]) {
            Width::D
        } else {
            Width::Q
        };
        let w = Width::from_bytes(i.iced.memory_size().size()).unwrap_or(i.width);
        let down = x.cpu.rflags.contains(Rflags::DF);
        let step = if down { w.bytes().wrapping_neg() } else { w.bytes() };
        Form { w, address, source: i.implicit_segment(), step }
    }

    #[inline(always)]
    fn index(&self, x: &Exec<'_>, r: Gpr) -> u64 {
        x.cpu.read(r, self.address)
    }

    #[inline(always)]
    fn advance(&self, x: &mut Exec<'_>, r: Gpr, elements: u64) {
        let v = self.index(x, r).wrapping_add(self.step.wrapping_mul(elements));
        x.cpu.write(r, self.address, v);
    }
}

/// Runs `element` once, or under a REP prefix until rCX is zero or `element` gives false. An element gives how many it did and
/// whether to go on; it is told how many it may do.
fn repeat(
    x: &mut Exec<'_>,
    i: &Insn,
    f: &Form,
    mut element: impl FnMut(&mut Exec<'_>, &Form, u64) -> Result<(u64, bool), Stop>,
) -> Step {
    if !(i.iced.has_rep_prefix() || i.iced.has_repne_prefix()) {
        return element(x, f, 1).map(|_| ());
    }
    // A single step traps after each element, and so may a breakpoint.
    let mut budget = if x.cpu.rflags.contains(Rflags::TF) || x.watching { 1 } else { BATCH };
    let mut left = x.cpu.read(Gpr::Rcx, f.address);
    if f.address == Width::D && Vendor::host() == Vendor::Intel && access::is_long64(x.cpu) {
        clear_upper_halves(x, i);
    }
    while left > 0 {
        if budget == 0 {
            x.next_rip = x.cpu.rip;
            return Ok(());
        }
        let (done, go_on) = element(x, f, left.min(budget))?;
        left -= done;
        budget -= done;
        x.cpu.write(Gpr::Rcx, f.address, left);
        if !go_on {
            return Ok(());
        }
    }
    Ok(())
}

/// With 32-bit addresses in 64-bit code Raptor Cove clears the upper half of RCX even if no element is done, because the count is 0 or the
/// first one faults; of REP MOVS and REP STOS also those of the indices.
fn clear_upper_halves(x: &mut Exec<'_>, i: &Insn) {
    let moves = is_any(i, &[Mnemonic::Movsb, Mnemonic::Movsw, Mnemonic::Movsd, Mnemonic::Movsq]);
    let stores = is_any(i, &[Mnemonic::Stosb, Mnemonic::Stosw, Mnemonic::Stosd, Mnemonic::Stosq]);
    for (r, cleared) in [(Gpr::Rcx, true), (Gpr::Rsi, moves), (Gpr::Rdi, moves || stores)] {
        if cleared {
            x.cpu.write(r, Width::D, x.cpu.read(r, Width::D));
        }
    }
}

fn is_any(i: &Insn, of: &[Mnemonic]) -> bool {
    of.contains(&i.iced.mnemonic())
}

/// How many elements from `index` upwards lie inside its page; 0 unless they go upwards without wrapping.
fn run_length(x: &Exec<'_>, f: &Form, index: u64, segment_base: u64, limit: u64) -> u64 {
    if x.cpu.rflags.contains(Rflags::DF) {
        return 0;
    }
    let in_page = (PAGE_SIZE - index.wrapping_add(segment_base) % PAGE_SIZE) / f.w.bytes();
    let before_wrap = (f.address.mask() - index) / f.w.bytes();
    in_page.min(before_wrap).min(limit)
}

fn base(x: &Exec<'_>, seg: Seg) -> u64 {
    x.cpu.segment(seg).base
}

/// MOVS.
pub fn movs(x: &mut Exec<'_>, i: &Insn) -> Step {
    let f = Form::of(x, i);
    repeat(x, i, &f, |x, f, most| {
        let (from, to) = (f.index(x, Gpr::Rsi), f.index(x, Gpr::Rdi));
        let (from_base, to_base) = (base(x, f.source), base(x, Seg::Es));
        let n = run_length(x, f, from, from_base, most).min(run_length(x, f, to, to_base, most));
        if n >= 4 && move_run(x, f, from, to, n * f.w.bytes()) {
            f.advance(x, Gpr::Rsi, n);
            f.advance(x, Gpr::Rdi, n);
            return Ok((n, true));
        }
        let v = access::load(x, f.source, from, f.w)?;
        access::store(x, Seg::Es, to, f.w, v)?;
        f.advance(x, Gpr::Rsi, 1);
        f.advance(x, Gpr::Rdi, 1);
        Ok((1, true))
    })
}

/// May a run be done without a check of each element's alignment?
fn unaligned_ok(x: &Exec<'_>) -> bool {
    // AC alone is STAC's, in a kernel that copies from and to its users.
    !access::checks_alignment(x.cpu)
}

/// Moves bytes that lie inside one page each. False, and nothing done, if it cannot be done whole.
fn move_run(x: &mut Exec<'_>, f: &Form, from: u64, to: u64, len: u64) -> bool {
    if !unaligned_ok(x) {
        return false;
    }
    let Some(from) = access::whole(x, f.source, from, len, Access::Read) else { return false };
    let Some(to) = access::whole(x, Seg::Es, to, len, Access::Write) else { return false };
    // A destination that begins inside the source repeats a pattern: element by element.
    if to.wrapping_sub(from) < len {
        return false;
    }
    x.mem.copy(from, to, len).is_some()
}

/// STOS.
pub fn stos(x: &mut Exec<'_>, i: &Insn) -> Step {
    let f = Form::of(x, i);
    repeat(x, i, &f, |x, f, most| {
        let to = f.index(x, Gpr::Rdi);
        let v = x.cpu.read(Gpr::Rax, f.w);
        let n = run_length(x, f, to, base(x, Seg::Es), most);
        if n >= 4 && unaligned_ok(x) {
            let mut buffer = [0; 256];
            let len = n * f.w.bytes();
            let bytes = &mut buffer[..len.min(256) as usize];
            for element in bytes.chunks_exact_mut(f.w.bytes() as usize) {
                element.copy_from_slice(&v.to_le_bytes()[..f.w.bytes() as usize]);
            }
            let part = |done: u64| &bytes[..(len - done).min(256) as usize];
            let at = access::whole(x, Seg::Es, to, len, Access::Write);
            if at.is_some_and(|at| (0..len).step_by(256).all(|done| x.mem.write(at + done, part(done)).is_some())) {
                f.advance(x, Gpr::Rdi, n);
                return Ok((n, true));
            }
        }
        access::store(x, Seg::Es, to, f.w, v)?;
        f.advance(x, Gpr::Rdi, 1);
        Ok((1, true))
    })
}

/// LODS.
pub fn lods(x: &mut Exec<'_>, i: &Insn) -> Step {
    let f = Form::of(x, i);
    repeat(x, i, &f, |x, f, _| {
        let from = f.index(x, Gpr::Rsi);
        let v = access::load(x, f.source, from, f.w)?;
        x.cpu.write(Gpr::Rax, f.w, v);
        f.advance(x, Gpr::Rsi, 1);
        Ok((1, true))
    })
}

/// Does REPE or REPNE go on with these flags?
fn goes_on(i: &Insn, flags: Rflags) -> bool {
    flags.contains(Rflags::ZF) != i.iced.has_repne_prefix()
}

/// Runs `element` as [`repeat`] does; it says how its comparison came out. On Raptor Cove the flags are those before the instruction until the
/// last element is done: whatever comes in between, an exception, an interrupt or a trap of TF, finds them so (SDM 2B REP says it of page
/// faults). On Zen 4 they are the last element's.
fn compare(
    x: &mut Exec<'_>,
    i: &Insn,
    f: &Form,
    mut element: impl FnMut(&mut Exec<'_>, &Form) -> Result<Rflags, Stop>,
) -> Step {
    let at_once = Vendor::host() == Vendor::Amd;
    let mut last = None;
    repeat(x, i, f, |x, f, _| {
        let flags = element(x, f)?;
        if at_once {
            x.cpu.rflags.replace(Rflags::STATUS, flags);
        }
        last = Some(flags);
        Ok((1, goes_on(i, flags)))
    })?;
    // Not behind the instruction: it was put off.
    if let Some(flags) = last.filter(|_| x.next_rip != x.cpu.rip) {
        x.cpu.rflags.replace(Rflags::STATUS, flags);
    }
    Ok(())
}

/// CMPS: source minus destination.
pub fn cmps(x: &mut Exec<'_>, i: &Insn) -> Step {
    let f = Form::of(x, i);
    let source_first =
        Vendor::host() == Vendor::Amd && f.w == Width::B && i.iced.has_rep_prefix() && !i.iced.has_repne_prefix();
    compare(x, i, &f, |x, f| {
        let (from, to) = (f.index(x, Gpr::Rsi), f.index(x, Gpr::Rdi));
        // If both fault, Zen 4 and Raptor Cove report the second operand, but Zen 4 of REPE CMPSB the first.
        let first = match source_first {
            true => Some(access::load(x, f.source, from, f.w)?),
            false => None,
        };
        let b = access::load(x, Seg::Es, to, f.w)?;
        let a = match first {
            Some(a) => a,
            None => access::load(x, f.source, from, f.w)?,
        };
        let (_, flags) = alu::sub(f.w, a, b, false);
        f.advance(x, Gpr::Rsi, 1);
        f.advance(x, Gpr::Rdi, 1);
        Ok(flags)
    })
}

/// SCAS: accumulator minus memory.
pub fn scas(x: &mut Exec<'_>, i: &Insn) -> Step {
    let f = Form::of(x, i);
    compare(x, i, &f, |x, f| {
        let to = f.index(x, Gpr::Rdi);
        let b = access::load(x, Seg::Es, to, f.w)?;
        let (_, flags) = alu::sub(f.w, x.cpu.read(Gpr::Rax, f.w), b, false);
        f.advance(x, Gpr::Rdi, 1);
        Ok(flags)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Fault;
    use crate::interp::testing::{CODE, DATA, Machine};
    use crate::vcpu::Exit;

    /// Runs `code` with RCX, RSI, RDI; gives them and RIP - CODE after.
    fn go(m: &mut Machine, regs: [u64; 3]) -> (Exit, [u64; 4]) {
        m.cpu().rip = CODE;
        [m.cpu().gpr[1], m.cpu().gpr[6], m.cpu().gpr[7]] = regs;
        let exit = m.run(1);
        (exit, [m.cpu().gpr[1], m.cpu().gpr[6], m.cpu().gpr[7], m.cpu().rip - CODE])
    }

    fn bytes(m: &Machine, at: u64, len: usize) -> Vec<u8> {
        let mut v = vec![0; len];
        m.mem.read(at, &mut v).expect("in RAM");
        v
    }

    #[test]
    fn rep_movsb_over_page_ends() {
        let mut m = Machine::long64(3, &[0xf3, 0xa4]);
        let text: Vec<u8> = (0..9000u32).map(|n| (n % 251) as u8).collect();
        m.mem.write(DATA + 5, &text).expect("in RAM");
        let (exit, regs) = go(&mut m, [9000, DATA + 5, DATA + 0x4003]);
        assert_eq!((exit, regs), (Exit::Budget, [0, DATA + 9005, DATA + 0x4003 + 9000, 2]));
        assert_eq!(bytes(&m, DATA + 0x4003, 9000), text);
    }

    #[test]
    fn overlap_repeats_the_pattern() {
        let mut m = Machine::long64(3, &[0xf3, 0xa4]);
        m.mem.write(DATA, b"abc").expect("in RAM");
        let (_, regs) = go(&mut m, [60, DATA, DATA + 3]);
        assert_eq!(regs[0], 0);
        assert_eq!(bytes(&m, DATA, 63), b"abc".repeat(21));
    }

    /// AC checks at CPL 3 only; a kernel has it set while it copies from its users (SMAP).
    #[test]
    fn alignment_is_checked_at_cpl_3_only() {
        for (cpl, expected) in [
            (0, (Exit::Budget, [0, DATA + 0x21, DATA + 0x60, 3])),
            (3, (Exit::Exception(Fault::Ac), [16, DATA + 1, DATA + 0x40, 0])),
        ] {
            // rep movsw
            let mut m = Machine::long64(cpl, &[0xf3, 0x66, 0xa5]);
            m.cpu().cr0 |= crate::cpu::Cr0::AM;
            m.cpu().rflags |= Rflags::AC;
            assert_eq!(go(&mut m, [16, DATA + 1, DATA + 0x40]), expected, "CPL {cpl}");
        }
    }

    /// Before the last element the flags are those before the instruction, on Intel; the upper halves are cleared without an element.
    #[test]
    fn what_a_repetition_leaves_before_its_end() {
        let amd = Vendor::host() == Vendor::Amd;
        // repne scasb, and with 67; the byte after the first is not mapped.
        let end = 2 << 20;
        for code in [&[0xf2, 0xae][..], &[0x67, 0xf2, 0xae]] {
            let mut m = Machine::long64(3, code);
            m.cpu().gpr[0] = 1;
            m.cpu().rflags |= Rflags::STATUS;
            let (exit, regs) = go(&mut m, [2, 0, end - 1]);
            assert_eq!((exit, regs), (Exit::Exception(Fault::Pf { addr: end, code: 4 }), [1, 0, end, 0]));
            // 1 - 0
            assert_eq!(m.cpu().rflags & Rflags::STATUS, if amd { Rflags::empty() } else { Rflags::STATUS });
        }
        // rep stosb, rep movsb, rep lodsb with 67 and a count of 0
        let high = 5 << 32;
        let cleared = |r: &[u64]| if amd { [high, high, high, 3] } else { [r[0], r[1], r[2], 3] };
        for (opcode, left) in [(0xaa, [0, high, 0]), (0xa4, [0, 0, 0]), (0xac, [0, high, high])] {
            let mut m = Machine::long64(3, &[0x67, 0xf3, opcode]);
            assert_eq!(go(&mut m, [high; 3]), (Exit::Budget, cleared(&left)), "{opcode:x}");
        }
    }

    #[test]
    fn downwards() {
        // std; rep movsd
        let mut m = Machine::long64(3, &[0xf3, 0xa5]);
        m.mem.write(DATA, &[1, 2, 3, 4, 5, 6, 7, 8]).expect("in RAM");
        m.cpu().rflags |= Rflags::DF;
        let (_, regs) = go(&mut m, [2, DATA + 4, DATA + 0x14]);
        assert_eq!(regs, [0, DATA - 4, DATA + 0xc, 2]);
        assert_eq!(bytes(&m, DATA + 0x10, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    }

    #[test]
    fn a_fault_leaves_the_elements_done() {
        // 2 MiB are mapped. rep stosq runs out of them.
        let mut m = Machine::long64(3, &[0xf3, 0x48, 0xab]);
        let end = 2 << 20;
        m.cpu().gpr[0] = 0x0102_0304_0506_0708;
        let (exit, regs) = go(&mut m, [600, 0, end - 1000 * 4]);
        assert_eq!(exit, Exit::Exception(Fault::Pf { addr: end, code: 6 }));
        assert_eq!(regs, [100, 0, end, 0]);
        assert_eq!(m.load(end - 8, Width::Q), 0x0102_0304_0506_0708);
    }

    #[test]
    fn compare_and_scan_stop_at_the_difference() {
        // repe cmpsb
        let mut m = Machine::long64(3, &[0xf3, 0xa6]);
        m.mem.write(DATA, b"abcdefgh").expect("in RAM");
        m.mem.write(DATA + 64, b"abcdeXgh").expect("in RAM");
        let (_, regs) = go(&mut m, [8, DATA, DATA + 64]);
        assert_eq!(regs, [2, DATA + 6, DATA + 70, 2]);
        // 'f' - 'X' = 0x0e: positive, three bits set
        assert_eq!(m.cpu().rflags & Rflags::STATUS, Rflags::AF);
        // repne scasb
        let mut m = Machine::long64(3, &[0xf2, 0xae]);
        m.mem.write(DATA, b"abcdefgh").expect("in RAM");
        m.cpu().gpr[0] = u64::from(b'd');
        let (_, regs) = go(&mut m, [8, 0, DATA]);
        assert_eq!(regs, [4, 0, DATA + 4, 2]);
        assert_eq!(m.cpu().rflags & Rflags::STATUS, Rflags::ZF | Rflags::PF);
    }

    #[test]
    fn count_zero_does_nothing_and_lods_keeps_the_last() {
        let mut m = Machine::long64(3, &[0xf3, 0xa4]);
        assert_eq!(go(&mut m, [0, 0x7fff_0000_0000, 1 << 40]).1, [0, 0x7fff_0000_0000, 1 << 40, 2]);
        let mut m = Machine::long64(3, &[0xf3, 0xac]);
        m.mem.write(DATA, &[7, 8, 9]).expect("in RAM");
        m.cpu().gpr[0] = 0x1100;
        go(&mut m, [3, DATA, 0]);
        assert_eq!(m.cpu().gpr[0], 0x1109);
    }

    #[test]
    fn real_mode_indices_wrap_at_64_kib() {
        let mut m = Machine::real(&[0xf3, 0xaa]);
        m.cpu().gpr[0] = 0x5a;
        let (exit, regs) = go(&mut m, [0x20, 0, 0xfff0]);
        assert_eq!((exit, regs), (Exit::Budget, [0, 0, 0x10, 2]));
        assert_eq!(bytes(&m, 0xfff0, 0x11), [&[0x5a; 0x10][..], &[0]].concat());
        assert_eq!(bytes(&m, 0, 0x11), [&[0x5a; 0x10][..], &[0]].concat());
    }

    /// Runs out of the 2 MiB that are mapped.
    #[test]
    fn flags_of_a_comparison_that_faults() {
        for prefix in [0xf2, 0xf3] {
            let mut m = Machine::long64(3, &[prefix, 0xae]);
            let end = 2 << 20;
            m.mem.write(end - 3, &[1; 3]).expect("in RAM");
            m.cpu().gpr[0] = if prefix == 0xf2 { 2 } else { 1 };
            m.cpu().rflags |= Rflags::OF | Rflags::SF;
            let (exit, regs) = go(&mut m, [5, 0, end - 3]);
            assert_eq!((exit, regs), (Exit::Exception(Fault::Pf { addr: end, code: 4 }), [2, 0, end, 0]));
            let expected = match (Vendor::host(), prefix) {
                (Vendor::Intel, _) => Rflags::OF | Rflags::SF,
                (Vendor::Amd, 0xf2) => Rflags::empty(),
                (Vendor::Amd, _) => Rflags::ZF | Rflags::PF,
            };
            assert_eq!(m.cpu().rflags & Rflags::STATUS, expected, "{prefix:x}");
        }
    }

    #[test]
    fn what_32_bit_addresses_cut() {
        let high = 0xabcd << 32;
        for (opcode, rsi, rdi) in [(0xa4, true, true), (0xaa, false, true), (0xac, false, false), (0xa6, false, false)]
        {
            let mut m = Machine::long64(3, &[0xf3, 0x67, opcode]);
            let (_, regs) = go(&mut m, [high, high | DATA, high | DATA]);
            let cut = |yes: bool, v: u64| if yes && Vendor::host() == Vendor::Intel { v & 0xffff_ffff } else { v };
            assert_eq!(regs, [cut(true, high), cut(rsi, high | DATA), cut(rdi, high | DATA), 3], "{opcode:x}");
        }
    }
}
