//! Memory operands of which only the elements that a mask selects are accessed (SDM 2A 2.8.1, 1 15.6.4): EVEX with an opmask,
//! VMASKMOV, VPMASKMOV, MASKMOVQ, MASKMOVDQU. What is not selected cannot fault.

use crate::cpu::Attr;
use crate::cpu::xsave::component;
use crate::interp::alu::Vendor;
use crate::interp::native::{
    at, behind, check, check_aligned, check_alignment_of_some, enter_x87, execute, faults_before_mxcsr,
};
use crate::interp::operand::effective_address;
use crate::interp::{Exec, Step, Stop, access};
use crate::isa::{Gpr, Insn, MemRef, Operand, Seg, Width};
use crate::mem::{Access, PAGE_SIZE};
use crate::native::{Needs, Thunk, kind};
use iced_x86::{Mnemonic, Register};

/// The active elements in memory as a mask, and how many there can be.
struct Active {
    bits: u64,
    lanes: usize,
    element: usize,
    /// On Zen 4 each element has an address of its own, which wraps at the address size (VEX); else the operand has one (EVEX).
    apart: bool,
}

impl Active {
    /// Calls `f` with start and length in bytes of each run of neighbours.
    fn runs(&self, mut f: impl FnMut(usize, usize) -> Step) -> Step {
        let mut rest = self.bits;
        let mut done = 0;
        while rest != 0 {
            let skip = rest.trailing_zeros();
            rest >>= skip;
            let n = if self.apart { 1 } else { rest.trailing_ones() };
            f((done + skip) as usize * self.element, n as usize * self.element)?;
            done += skip + n;
            rest = rest.checked_shr(n).unwrap_or(0);
        }
        Ok(())
    }

    /// The bytes from the first active one to the last: start and end.
    fn span(&self) -> (usize, usize) {
        let end = u64::BITS - self.bits.leading_zeros();
        (self.bits.trailing_zeros() as usize * self.element, end as usize * self.element)
    }

    /// The linear address of `len` bytes from `start` on, among them an active one, and none behind the last.
    fn linear(&self, x: &Exec<'_>, m: &MemRef, offset: u64, part: (usize, usize), access: Access) -> Result<u64, Stop> {
        let (start, len) = part;
        match Vendor::host() {
            Vendor::Amd if self.apart => access::linear(x, m.seg, at(m, offset, start as u64), len as u64, access),
            Vendor::Amd => access::linear(x, m.seg, behind(offset, start), len as u64, access),
            Vendor::Intel => {
                let first = linear_span(x, m, offset, self, access)?.wrapping_add((start - self.span().0) as u64);
                Ok(if access::is_long64(x.cpu) { first } else { Width::D.cut(first) })
            }
        }
    }
}

fn low_bits(n: usize) -> u64 {
    if n >= 64 { u64::MAX } else { (1 << n) - 1 }
}

/// An EVEX instruction with an opmask whose memory operand suppresses faults.
pub fn run(x: &mut Exec<'_>, i: &Insn, m: &MemRef, offset: u64, t: &Thunk) -> Step {
    let mask = x.cpu.xsave.opmask(i.iced.op_mask().number());
    let active = active(i, mask, t);
    // A processor looks at the alignment only if it accesses anything.
    if active.bits != 0 && t.needs.contains(Needs::ALIGNED) {
        check_aligned(x, t, m.seg, offset)?;
    }
    if active.bits != 0 {
        match Vendor::host() {
            // Of elements of one or two bytes none is checked (Zen 4).
            Vendor::Amd if active.element < 4 => {}
            Vendor::Amd => check_alignment_of_some(x, t, m.seg, offset)?,
            // The result's exceptions come before those of the store.
            Vendor::Intel if t.needs.contains(Needs::STORE | Needs::MXCSR) => {}
            Vendor::Intel => {
                let access = if t.needs.contains(Needs::STORE) { Access::Write } else { Access::Read };
                linear_span(x, m, offset, &active, access)?;
                check_alignment_of_some(x, t, m.seg, offset)?;
            }
        }
    }
    x.env.native.operand().fill(0);
    if t.needs.contains(Needs::LOAD) {
        read(x, m, offset, &active)?;
    }
    let store = t.needs.contains(Needs::STORE);
    if t.needs.contains(Needs::WHOLE) {
        access::check_write(x, m.seg, offset, u64::from(t.len))?;
    }
    if store && faults_before_mxcsr(t) {
        check_store(x, m, offset, &active)?;
    }
    execute(x, t, None)?;
    if store {
        let bytes = *x.env.native.operand();
        write(x, m, offset, &active, &bytes)?;
    }
    Ok(())
}

/// Which elements of the memory operand the opmask makes the instruction access.
fn active(i: &Insn, mask: u64, t: &Thunk) -> Active {
    let element = usize::from(t.element).max(1);
    let count = (usize::from(t.len) / element).max(1);
    let full = kind::full_size(i.iced.code());
    let name = i.iced.mnemonic();
    let lanes = if repeats(name) { i.iced.op0_register().size() / element } else { full / element };
    let mask = mask & low_bits(lanes);
    let bits = if t.needs.contains(Needs::PACKED) {
        low_bits(mask.count_ones() as usize)
    } else if lanes > count {
        // One element in memory serves several lanes.
        (0..lanes).filter(|n| mask >> n & 1 != 0).fold(0, |b, n| b | 1 << (n % count))
    } else {
        mask
    };
    Active { bits, lanes: count, element, apart: false }
}

/// Broadcasts by their name; their destination has more elements than memory.
#[rustfmt::skip]
fn repeats(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Vbroadcastss | Mnemonic::Vbroadcastsd
        | Mnemonic::Vbroadcastf32x2 | Mnemonic::Vbroadcastf32x4 | Mnemonic::Vbroadcastf32x8
        | Mnemonic::Vbroadcastf64x2 | Mnemonic::Vbroadcastf64x4
        | Mnemonic::Vbroadcasti32x2 | Mnemonic::Vbroadcasti32x4 | Mnemonic::Vbroadcasti32x8
        | Mnemonic::Vbroadcasti64x2 | Mnemonic::Vbroadcasti64x4
        | Mnemonic::Vpbroadcastb | Mnemonic::Vpbroadcastw | Mnemonic::Vpbroadcastd | Mnemonic::Vpbroadcastq
    )
}

fn read(x: &mut Exec<'_>, m: &MemRef, offset: u64, active: &Active) -> Step {
    active.runs(|start, len| {
        let mut bytes = [0; 64];
        let laddr = active.linear(x, m, offset, (start, len), Access::Read)?;
        access::read_linear(x, laddr, &mut bytes[..len])?;
        x.env.native.operand()[start..start + len].copy_from_slice(&bytes[..len]);
        Ok(())
    })
}

/// All faults of the elements of a store.
fn check_store(x: &mut Exec<'_>, m: &MemRef, offset: u64, active: &Active) -> Step {
    if Vendor::host() == Vendor::Intel && active.lanes > 1 {
        return check_span(x, m, offset, active);
    }
    active.runs(|start, len| {
        let laddr = active.linear(x, m, offset, (start, len), Access::Write)?;
        access::check_linear(x, laddr, len as u64, Access::Write)
    })
}

/// The linear address of the first active byte. Raptor Cove looks whether all bytes up to the last one are at canonical addresses, or within
/// the segment's limit, before it accesses any of them. The first one's offset wraps at 32 bits, also where addresses have 16; those of the
/// others go on from there. In a segment that ends at 4 GiB they wrap, so there only the first element is looked at, or byte of a store.
fn linear_span(x: &Exec<'_>, m: &MemRef, offset: u64, active: &Active, access: Access) -> Result<u64, Stop> {
    let (start, end) = active.span();
    let (first, len) = (behind(offset, start), (end - start) as u64);
    if access::is_long64(x.cpu) {
        return access::linear(x, m.seg, first, len, access);
    }
    let first = Width::D.cut(first);
    let s = x.cpu.segment(m.seg);
    let whole = s.limit == u32::MAX && !s.attr.contains(Attr::EXPAND_DOWN);
    let len = match access {
        _ if !whole => len,
        Access::Write if active.lanes > 1 => 1,
        _ => active.element as u64,
    };
    access::linear(x, m.seg, first, len, access)
}

/// Raptor Cove looks at the first active byte and, if it is on another page, at the last one. What is between them may be inactive, and CR2
/// is that byte's address even where it is not the first of its page.
fn check_span(x: &mut Exec<'_>, m: &MemRef, offset: u64, active: &Active) -> Step {
    if active.bits == 0 {
        return Ok(());
    }
    let (_, end) = active.span();
    let first = linear_span(x, m, offset, active, Access::Write)?;
    let last = active.linear(x, m, offset, (end - 1, 1), Access::Write)?;
    access::check_linear(x, first, 1, Access::Write)?;
    if (first ^ last) & !(PAGE_SIZE - 1) != 0 { access::check_linear(x, last, 1, Access::Write) } else { Ok(()) }
}

/// All faults of all elements first.
fn write(x: &mut Exec<'_>, m: &MemRef, offset: u64, active: &Active, bytes: &[u8]) -> Step {
    check_store(x, m, offset, active)?;
    store_active(x, m, offset, active, bytes)
}

/// The elements of which it is known that they can be stored.
fn store_active(x: &mut Exec<'_>, m: &MemRef, offset: u64, active: &Active, bytes: &[u8]) -> Step {
    active.runs(|start, len| {
        let laddr = active.linear(x, m, offset, (start, len), Access::Write)?;
        access::write_linear(x, laddr, &bytes[start..start + len])
    })
}

/// The sign bits of a vector register's elements.
fn signs(x: &Exec<'_>, r: Register, element: usize) -> u64 {
    let z = x.cpu.xsave.zmm(r.number());
    (0..r.size() / element).fold(0, |b, n| b | u64::from(z[n * element + element - 1] >> 7) << n)
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ: the mask is the sign bits of operand 1.
pub fn vmaskmov(x: &mut Exec<'_>, i: &Insn) -> Step {
    check(x.cpu, Needs::AVX)?;
    let element = match i.iced.mnemonic() {
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => 4,
        _ => 8,
    };
    let mask = i.iced.op1_register();
    let active = Active { bits: signs(x, mask, element), lanes: mask.size() / element, element, apart: true };
    let Some(m) = i.mem() else { return Err(crate::cpu::Fault::Ud.into()) };
    let offset = effective_address(x, i, m);
    if matches!(i.ops[0], Operand::Mem(_)) {
        let data = x.cpu.xsave.zmm(i.iced.op2_register().number());
        return write(x, m, offset, &active, &data);
    }
    if active.bits != 0 && Vendor::host() == Vendor::Intel {
        linear_span(x, m, offset, &active, Access::Read)?;
    }
    x.env.native.operand().fill(0);
    read(x, m, offset, &active)?;
    let to = i.iced.op0_register();
    let mut z = [0; 64];
    let len = to.size();
    z[..len].copy_from_slice(&x.env.native.operand()[..len]);
    set_vector(x, to, z);
    Ok(())
}

/// Sets a whole vector register as a VEX instruction does: what is past it becomes zero.
pub fn set_vector(x: &mut Exec<'_>, r: Register, z: [u8; 64]) {
    // ZMM halves that were never used need not come into use for zeros.
    let bv = x.cpu.xsave.xstate_bv();
    x.cpu.xsave.set_zmm(r.number(), z);
    if r.number() < 16 && z[32..] == [0; 32] && bv & component::ZMM_HI256 == 0 {
        let now = x.cpu.xsave.xstate_bv();
        x.cpu.xsave.set_xstate_bv(now & !component::ZMM_HI256);
    }
}

/// MASKMOVDQU, VMASKMOVDQU: bytes of operand 1 (iced counts the implicit destination as operand 0) to DS:rDI.
pub fn maskmovdqu(x: &mut Exec<'_>, i: &Insn) -> Step {
    let avx = i.iced.mnemonic() == Mnemonic::Vmaskmovdqu;
    check(x.cpu, if avx { Needs::AVX } else { Needs::SSE })?;
    let active = Active { bits: signs(x, i.iced.op2_register(), 1), lanes: 16, element: 1, apart: false };
    let data = x.cpu.xsave.zmm(i.iced.op1_register().number());
    let m = destination(i);
    let offset = m.address.cut(x.cpu.gpr[Gpr::Rdi as usize]);
    check_halves(x, m.seg, offset, 2)?;
    store_active(x, &m, offset, &active, &data)
}

/// Which faults an unselected byte may give is the processor's choice (SDM 2B MASKMOVDQU): all of them. Raptor Cove stores quadwords, the
/// upper one first, and looks at their alignment.
fn check_halves(x: &mut Exec<'_>, seg: Seg, offset: u64, count: usize) -> Step {
    if Vendor::host() == Vendor::Amd {
        return access::check_write(x, seg, offset, 8 * count as u64);
    }
    (0..count).rev().try_for_each(|n| access::check_integer(x, seg, behind(offset, 8 * n), Width::Q, Access::Write))
}

/// MASKMOVQ: the same with MMX registers, and the x87 state becomes MMX's.
pub fn maskmovq(x: &mut Exec<'_>, i: &Insn) -> Step {
    check(x.cpu, Needs::MMX)?;
    enter_x87(x, Needs::WAITING)?;
    x.env.native.leave_x87(&mut x.cpu.xsave);
    let (source, mask) = (mmx(x, i.iced.op1_register()), mmx(x, i.iced.op2_register()));
    let bits = (0..8).fold(0, |b, n| b | u64::from(mask[n] >> 7) << n);
    let m = destination(i);
    let offset = m.address.cut(x.cpu.gpr[Gpr::Rdi as usize]);
    // The state is MMX's even if the store faults.
    enter_mmx(x);
    check_halves(x, m.seg, offset, 1)?;
    store_active(x, &m, offset, &Active { bits, lanes: 8, element: 1, apart: false }, &source)
}

/// The implicit operand DS:rDI, with its override.
fn destination(i: &Insn) -> MemRef {
    let seg = i.implicit_segment();
    let address = match i.iced.op0_kind() {
        iced_x86::OpKind::MemorySegDI => Width::W,
        iced_x86::OpKind::MemorySegEDI => Width::D,
        _ => Width::Q,
    };
    MemRef { seg, base: crate::isa::Base::Reg(Gpr::Rdi), index: None, scale: 0, address, disp: 0 }
}

fn top(x: &Exec<'_>) -> usize {
    usize::from(x.cpu.xsave.fsw() >> 11 & 7)
}

/// An MMX register is the significand of the physical x87 register of its number; the image counts from the top of the stack.
fn mmx(x: &Exec<'_>, r: Register) -> [u8; 8] {
    let st = x.cpu.xsave.st((r.number() + 8 - top(x)) & 7);
    st[..8].try_into().expect("eight bytes")
}

/// SDM 1 9.5: an MMX instruction sets TOS to 0 and all tags to valid.
fn enter_mmx(x: &mut Exec<'_>) {
    clear_top(x);
    x.cpu.xsave.set_ftw_abridged(0xff);
}

/// Sets TOS to 0; the registers of the image stay what they are by their own numbers.
pub fn clear_top(x: &mut Exec<'_>) {
    let t = top(x);
    let st: [[u8; 10]; 8] = std::array::from_fn(|n| x.cpu.xsave.st((n + 8 - t) & 7));
    for (n, v) in st.into_iter().enumerate() {
        x.cpu.xsave.set_st(n, v);
    }
    let fsw = x.cpu.xsave.fsw() & !(7 << 11);
    x.cpu.xsave.set_fsw(fsw);
}

#[cfg(test)]
mod tests {
    use crate::cpu::{Fault, Segment};
    use crate::interp::alu::Vendor;
    use crate::interp::testing::Machine;
    use crate::isa::{Gpr, Seg, Width};
    use crate::vcpu::Exit;

    /// Behind it no page is there.
    const END: u64 = 0x20_0000;

    /// Exit, FSW and tags.
    type Left = (Exit, u16, u8);
    /// Name, code, address, FCW, FSW and tags before, what is left on AMD's processors and on Intel's.
    type Row<'a> = (&'a str, &'a [u8], u64, (u16, u16, u8), [Left; 2]);

    /// What a vendor's processor says of a store to `rdi`, with the sign bits of lanes 0 and 3 set in XMM0: FCW, FSW and tags before.
    fn store(code: &[u8], rdi: u64, (fcw, fsw, tags): (u16, u16, u8)) -> Left {
        let mut m = Machine::long64(3, code);
        m.cpu().gpr[Gpr::Rdi as usize] = rdi;
        let x = &mut m.cpu().xsave;
        let mut mask = [0; 64];
        (mask[3], mask[15]) = (0x80, 0x80);
        x.set_zmm(0, mask);
        x.set_fcw(fcw);
        x.set_fsw(fsw);
        x.set_ftw_abridged(tags);
        let exit = m.run(1);
        (exit, m.cpu().xsave.fsw(), m.cpu().xsave.ftw_abridged())
    }

    /// Measured on Zen 4 and on Raptor Cove.
    #[test]
    fn stores_that_fault() {
        let pf = |addr| Exit::Exception(Fault::Pf { addr, code: 6 });
        let usual = (0x37f, 0, 0);
        let (invalid, top) = ((0x37e, 0, 0), (0x37f, 5 << 11, 0xa5));
        let rows: [Row; 4] = [
            ("maskmovdqu", &[0x66, 0x0f, 0xf7, 0xc8], END - 4, usual, [(pf(END), 0, 0), (pf(END + 4), 0, 0)]),
            (
                "vmaskmovps",
                &[0xc4, 0xe2, 0x79, 0x2e, 0x0f],
                END - 4,
                usual,
                [(pf(END + 8), 0, 0), (pf(END + 11), 0, 0)],
            ),
            // An empty register and #IS unmasked: nothing is stored.
            ("fistp", &[0xdf, 0x1f], END, invalid, [(pf(END), 0, 0), (Exit::Budget, 0x80c1, 0)]),
            ("movq", &[0x0f, 0x7f, 0x0f], END, top, [(pf(END), 5 << 11, 0xa5), (pf(END), 0, 0xa5)]),
        ];
        for (name, code, rdi, before, [amd, intel]) in rows {
            if name == "vmaskmovps" && !std::is_x86_feature_detected!("avx") {
                continue;
            }
            let should = if Vendor::host() == Vendor::Amd { amd } else { intel };
            assert_eq!(store(code, rdi, before), should, "{name}");
        }
    }

    /// Measured on Zen 4 and on Raptor Cove: elements behind the end of 16-bit addresses. testsuite/tests/masked.rs compares all sorts of them
    /// with the host CPU.
    #[test]
    fn elements_wrap_or_go_on() {
        if !std::is_x86_feature_detected!("avx") {
            return;
        }
        // vmaskmovpd xmm2, xmm1, [bx]; vmaskmovpd [bx], xmm1, xmm2, in 32-bit code
        for (load, code) in
            [(true, [0x67, 0xc4, 0xe2, 0x71, 0x2d, 0x17]), (false, [0x67, 0xc4, 0xe2, 0x71, 0x2f, 0x17])]
        {
            let mut m = Machine::long64(3, &code);
            m.cpu().seg[Seg::Cs as usize] = Segment::code32(0x23, 3);
            m.cpu().seg[Seg::Ds as usize] = Segment::data32(0x2b, 3);
            m.cpu().gpr[Gpr::Rbx as usize] = 0xfff8;
            let (mut mask, mut data) = ([0; 64], [0; 64]);
            mask[15] = 0x80;
            data[8..16].fill(0xdd);
            m.cpu().xsave.set_zmm(1, mask);
            m.cpu().xsave.set_zmm(2, data);
            m.mem.write(0, &[0xaa; 8]).expect("in RAM");
            m.mem.write(0x1_0000, &[0xbb; 8]).expect("in RAM");
            assert_eq!(m.run(1), Exit::Budget);
            let amd = Vendor::host() == Vendor::Amd;
            if load {
                assert_eq!(m.cpu().xsave.zmm(2)[8..16], [if amd { 0xaa } else { 0xbb }; 8]);
            } else {
                assert_eq!(m.load(if amd { 0 } else { 0x1_0000 }, Width::Q), 0xdddd_dddd_dddd_dddd);
            }
        }
    }

    /// Measured on Zen 4 and on Raptor Cove.
    #[test]
    fn eighty_bits_over_a_page_end() {
        // fldpi; fstp tbyte ptr [rdi]
        let mut m = Machine::long64(3, &[0xd9, 0xeb, 0xdb, 0x3f]);
        m.cpu().gpr[Gpr::Rdi as usize] = END - 8;
        m.mem.write(END - 8, &[0xee; 8]).expect("in RAM");
        assert_eq!(m.run(2), Exit::Exception(Fault::Pf { addr: END, code: 6 }));
        let stored = if Vendor::host() == Vendor::Amd { [0xee; 8] } else { 0xc90f_daa2_2168_c235_u64.to_le_bytes() };
        assert_eq!(m.load(END - 8, Width::Q).to_le_bytes(), stored);
        assert_eq!(m.cpu().xsave.ftw_abridged(), 0x80, "it is not popped");
    }
}
