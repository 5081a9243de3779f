//! What loads and stores the state itself: MXCSR, FXSAVE, FXRSTOR, XSAVE and its kin, VZEROUPPER (SDM 1 10.5, 13.7-13.12).

use crate::cpu::xsave::{Layout, component};
use crate::cpu::{CpuState, Cr0, Cr4, Fault, XsaveArea};
use crate::interp::access::{self, Known};
use crate::interp::alu::Vendor;
use crate::interp::native::{behind, check, enter_x87};
use crate::interp::operand::effective_address;
use crate::interp::{Exec, Step, Stop};
use crate::isa::host_cpu::cpuid;
use crate::isa::{Gpr, Insn, MemRef, Seg, Width};
use crate::mem::Access;
use crate::native::Needs;
use iced_x86::{Code, EncodingKind, Mnemonic};
use std::ops::Range;
use std::sync::OnceLock;

/// XCOMP_BV bit 63: compacted format.
const COMPACT: u64 = 1 << 63;
/// The bytes of the legacy region that belong to x87.
const X87_PARTS: [Range<usize>; 2] = [0..24, 32..160];
const MXCSR: usize = 24;
const XSTATE_BV: usize = 512;
const LEGACY_REGION: usize = 512;
const LEGACY: usize = 576;

/// Bits of MXCSR that are not reserved, as FXSAVE reports them in MXCSR_MASK.
pub fn mxcsr_mask() -> u32 {
    static MASK: OnceLock<u32> = OnceLock::new();
    *MASK.get_or_init(|| {
        let misaligned_mode = std::is_x86_feature_detected!("sse4a") || is_amd_misaligned();
        if misaligned_mode { 0x2_ffff } else { 0xffff }
    })
}

/// CPUID 8000_0001h ECX bit 7: MXCSR.MM exists.
fn is_amd_misaligned() -> bool {
    cpuid(0x8000_0000, 0)[0] > 0x8000_0000 && cpuid(0x8000_0001, 0)[2] >> 7 & 1 != 0
}

fn memory(x: &Exec<'_>, i: &Insn) -> Result<(MemRef, u64), Stop> {
    let m = i.mem().copied().ok_or(Fault::Ud)?;
    Ok((m, effective_address(x, i, &m)))
}

fn mxcsr_needs(i: &Insn) -> Needs {
    if i.iced.code().encoding() == EncodingKind::Legacy { Needs::SSE } else { Needs::AVX }
}

/// LDMXCSR, VLDMXCSR: reserved bits give #GP(0).
pub fn ldmxcsr(x: &mut Exec<'_>, i: &Insn) -> Step {
    check(x.cpu, mxcsr_needs(i))?;
    let (m, offset) = memory(x, i)?;
    let v = access::load(x, m.seg, offset, Width::D)? as u32;
    if v & !mxcsr_mask() != 0 {
        return Err(Fault::Gp(0).into());
    }
    x.cpu.xsave.set_mxcsr(v);
    Ok(())
}

/// STMXCSR, VSTMXCSR.
pub fn stmxcsr(x: &mut Exec<'_>, i: &Insn) -> Step {
    check(x.cpu, mxcsr_needs(i))?;
    let (m, offset) = memory(x, i)?;
    access::store(x, m.seg, offset, Width::D, u64::from(x.cpu.xsave.mxcsr()))
}

/// VZEROUPPER: bits above 127 of all registers that the mode has.
pub fn vzeroupper(x: &mut Exec<'_>, i: &Insn) -> Step {
    check(x.cpu, Needs::AVX)?;
    let all = i.iced.mnemonic() == Mnemonic::Vzeroall;
    if access::is_long64(x.cpu) {
        // ZMM16-31 are kept, so this is the initial configuration of whole components.
        let mut gone = component::AVX | component::ZMM_HI256;
        gone |= if all { component::SSE } else { 0 };
        let bv = x.cpu.xsave.xstate_bv();
        x.cpu.xsave.set_xstate_bv(bv & !gone);
        return Ok(());
    }
    let image = &mut x.cpu.xsave;
    for n in 0..8 {
        let mut z = image.zmm(n);
        z[if all { 0 } else { 16 }..].fill(0);
        image.set_zmm(n, z);
    }
    Ok(())
}

fn is_64(i: &Insn) -> bool {
    use Mnemonic as M;
    matches!(i.iced.mnemonic(), M::Fxsave64 | M::Fxrstor64 | M::Xsave64 | M::Xsavec64 | M::Xsaveopt64 | M::Xrstor64)
}

/// Vector registers that the mode has.
fn registers(cpu: &CpuState) -> usize {
    if access::is_long64(cpu) { 16 } else { 8 }
}

/// FXSAVE, FXRSTOR: CR0.EM and CR0.TS give #NM, a misaligned operand #AC where alignment is checked, else #GP(0).
fn fx_checks(x: &Exec<'_>, m: &MemRef, offset: u64, access: Access) -> Step {
    if x.cpu.cr0.intersects(Cr0::EM | Cr0::TS) {
        return Err(Fault::Nm.into());
    }
    if Vendor::host() == Vendor::Intel {
        return aligned(x, m, offset, LEGACY_REGION as u64, 16, access);
    }
    let laddr = access::linear(x, m.seg, offset, 512, access)?;
    match laddr & 15 {
        0 => Ok(()),
        _ if access::checks_alignment(x.cpu) => Err(Fault::Ac.into()),
        _ => Err(Fault::Gp(0).into()),
    }
}

/// XSAVE and its kin: a misaligned operand gives #GP(0), before the address is known to be canonical (Zen 4). On Raptor Cove the first
/// byte has to be at a canonical address, and where alignment is checked #AC comes if not even doublewords are aligned.
fn aligned(x: &Exec<'_>, m: &MemRef, offset: u64, len: u64, to: u64, access: Access) -> Step {
    if Vendor::host() == Vendor::Intel {
        access::linear_aligned(x, m.seg, offset, 1, 4, access)?;
    }
    if x.cpu.segment(m.seg).base.wrapping_add(offset) & (to - 1) != 0 {
        return Err(Fault::Gp(0).into());
    }
    access::linear(x, m.seg, offset, len, access)?;
    Ok(())
}

/// A state image in memory.
struct Image {
    seg: Seg,
    offset: u64,
    access: Access,
    known: Option<Known>,
}

impl Image {
    /// At the operand, usually of `len` bytes.
    fn new(x: &Exec<'_>, (m, offset): (&MemRef, u64), len: usize, access: Access) -> Image {
        Image { seg: m.seg, offset, access, known: access::known(x, m.seg, offset, len, access) }
    }

    /// Looks at these bytes before all others, as Raptor Cove does: CR2 is the address of one of them. All other bytes are on their
    /// pages, because an image is shorter than a page.
    fn probe(&self, x: &mut Exec<'_>, bytes: &[usize]) -> Step {
        match Vendor::host() {
            Vendor::Amd => Ok(()),
            Vendor::Intel => bytes.iter().try_for_each(|n| self.check(x, *n..n + 1)),
        }
    }

    /// All faults of an access of these bytes.
    fn check(&self, x: &mut Exec<'_>, bytes: Range<usize>) -> Step {
        match &self.known {
            Some(k) if k.has(bytes.clone()) => Ok(()),
            _ => access::check(x, self.seg, behind(self.offset, bytes.start), bytes.len() as u64, self.access),
        }
    }

    /// Reads from byte `at` on.
    fn read(&self, x: &mut Exec<'_>, at: usize, to: &mut [u8]) -> Step {
        match &self.known {
            Some(k) if k.has(at..at + to.len()) => {
                k.read(x, at, to);
                Ok(())
            }
            _ => access::read_bytes(x, self.seg, behind(self.offset, at), to),
        }
    }

    /// Writes from byte `at` on.
    fn write(&self, x: &mut Exec<'_>, at: usize, from: &[u8]) -> Step {
        match &self.known {
            Some(k) if k.has(at..at + from.len()) => {
                k.write(x, at, from);
                Ok(())
            }
            _ => access::write_bytes(x, self.seg, behind(self.offset, at), from),
        }
    }
}

/// The first byte of an XSAVE image that is accessed for these components: of the x87 state, MXCSR, or the header.
fn first_byte(components: u64, has_mxcsr: bool) -> usize {
    match (components & component::X87 != 0, has_mxcsr) {
        (true, _) => 0,
        (_, true) => MXCSR,
        _ if components == 0 => LEGACY - 1,
        _ => XSTATE_BV,
    }
}

/// The legacy region as FXSAVE and XSAVE write it: with FCS and FDS instead of the high halves of the pointers in the 32-bit form.
fn legacy(x: &mut Exec<'_>, wide: bool, out: &mut [u8]) {
    x.env.native.sync_x87(&mut x.cpu.xsave);
    let image = &mut x.cpu.xsave;
    image.materialize(component::X87 | component::SSE);
    out.copy_from_slice(&image.bytes[..LEGACY_REGION]);
    out[MXCSR + 4..MXCSR + 8].copy_from_slice(&mxcsr_mask().to_le_bytes());
    if !wide {
        let p = x.env.native.pointers();
        let deprecated = x.env.cpu_model.cpuid(x.cpu, 7, 0)[1] >> 13 & 1 != 0;
        for (at, selector) in [(12, p.fcs), (20, p.fds)] {
            let used = !deprecated && out[at - 4..at] != [0; 4];
            out[at..at + 4].copy_from_slice(&u32::from(if used { selector } else { 0 }).to_le_bytes());
        }
    }
}

/// FXSAVE, FXSAVE64.
pub fn fxsave(x: &mut Exec<'_>, i: &Insn) -> Step {
    let (m, offset) = memory(x, i)?;
    fx_checks(x, &m, offset, Access::Write)?;
    let image = Image::new(x, (&m, offset), LEGACY_REGION, Access::Write);
    image.probe(x, &[LEGACY_REGION - 1, 0])?;
    image.check(x, 0..LEGACY_REGION)?;
    let mut out = [0; LEGACY_REGION];
    legacy(x, is_64(i), &mut out);
    image.write(x, 0, &out[..Layout::XMM + 16 * registers(x.cpu)])
}

/// FXRSTOR, FXRSTOR64.
pub fn fxrstor(x: &mut Exec<'_>, i: &Insn) -> Step {
    let (m, offset) = memory(x, i)?;
    fx_checks(x, &m, offset, Access::Read)?;
    let image = Image::new(x, (&m, offset), LEGACY_REGION, Access::Read);
    image.probe(x, &[LEGACY_REGION - 1, 0])?;
    let mut from = [0; 512];
    image.read(x, 0, &mut from)?;
    let mxcsr = word(&from, MXCSR);
    if mxcsr & !mxcsr_mask() != 0 {
        return Err(Fault::Gp(0).into());
    }
    set_x87(x, &from, is_64(i))?;
    let xmm = Layout::XMM..Layout::XMM + 16 * registers(x.cpu);
    let image = &mut x.cpu.xsave;
    image.set_mxcsr(mxcsr);
    image.activate(component::SSE);
    image.bytes[xmm.clone()].copy_from_slice(&from[xmm]);
    Ok(())
}

fn word(b: &[u8], n: usize) -> u32 {
    u32::from_le_bytes(b[n..n + 4].try_into().expect("four bytes"))
}

/// x87 state from a legacy region, through the host's registers, which drop what is not kept.
fn set_x87(x: &mut Exec<'_>, from: &[u8], wide: bool) -> Step {
    // The usual state needs no such way: all registers empty and 0, FCW 37F, and so nothing pending.
    let initial = from[..2] == [0x7f, 3] && is_zero(&from[2..24]) && is_zero(&from[32..160]);
    if initial && x.cpu.cr0.contains(Cr0::NE) {
        x.env.native.reset_x87(&mut x.cpu.xsave);
        x.cpu.xsave.activate(component::X87);
        return Ok(());
    }
    x.env.native.leave_x87(&mut x.cpu.xsave);
    let image = &mut x.cpu.xsave;
    image.activate(component::X87);
    for part in X87_PARTS {
        image.bytes[part.clone()].copy_from_slice(&from[part]);
    }
    let mut selectors = (0, 0);
    if !wide {
        selectors = (u16::from_le_bytes([from[12], from[13]]), u16::from_le_bytes([from[20], from[21]]));
        image.bytes[12..16].fill(0);
        image.bytes[20..24].fill(0);
    }
    enter_x87(x, Needs::X87)?;
    x.env.native.set_selectors(selectors.0, selectors.1);
    Ok(())
}

/// A state component of the extended region: where it is in the image, and how many of its bytes the mode has.
struct Part {
    bit: u64,
    at: usize,
    size: usize,
    used: usize,
}

fn parts(cpu: &CpuState) -> [Part; 4] {
    let l = Layout::host();
    let long = access::is_long64(cpu);
    let half = |size: usize| if long { size } else { size / 2 };
    [
        Part { bit: component::AVX, at: l.avx, size: 256, used: half(256) },
        Part { bit: component::OPMASK, at: l.opmask, size: 64, used: 64 },
        Part { bit: component::ZMM_HI256, at: l.zmm_hi256, size: 512, used: half(512) },
        Part { bit: component::HI16_ZMM, at: l.hi16_zmm, size: 1024, used: if long { 1024 } else { 0 } },
    ]
}

/// Requested-feature bitmap: EDX:EAX and XCR0.
fn requested(cpu: &CpuState) -> u64 {
    let mask = cpu.gpr[Gpr::Rdx as usize] << 32 | cpu.gpr[Gpr::Rax as usize] & 0xffff_ffff;
    mask & cpu.xcr0
}

/// The components that are not in their initial configuration (SDM 1 13.6). x87, opmask and ZMM16-31 stay in use once they were;
/// the others are looked at.
pub fn in_use(x: &mut Exec<'_>) -> u64 {
    x.env.native.sync_x87(&mut x.cpu.xsave);
    let image = &x.cpu.xsave;
    let l = Layout::host();
    let mut used = image.xstate_bv() & l.components;
    for (bit, range) in [
        (component::SSE, Layout::XMM..Layout::XMM + 256),
        (component::AVX, l.avx..l.avx + 256),
        (component::ZMM_HI256, l.zmm_hi256..l.zmm_hi256 + 512),
    ] {
        if used & bit != 0 && is_zero(&image.bytes[range]) {
            used &= !bit;
        }
    }
    if image.mxcsr() != 0x1f80 {
        used |= component::SSE;
    }
    if Vendor::host() == Vendor::Intel && !access::is_long64(x.cpu) {
        // Where there are no ZMM16-31: measured on Raptor Cove.
        used &= !component::HI16_ZMM;
    }
    used
}

/// At most 1024 bytes.
fn is_zero(bytes: &[u8]) -> bool {
    bytes == &ZEROS[..bytes.len()]
}

fn xmm_is_zero(image: &XsaveArea) -> bool {
    image.xstate_bv() & component::SSE == 0 || is_zero(&image.bytes[Layout::XMM..Layout::XMM + 256])
}

/// CR4.OSXSAVE clear gives #UD, CR0.TS #NM, an operand not aligned to 64 bytes #GP(0).
fn xsave_checks(x: &Exec<'_>, m: &MemRef, offset: u64, access: Access) -> Step {
    if !x.cpu.cr4.contains(Cr4::OSXSAVE) {
        return Err(Fault::Ud.into());
    }
    if x.cpu.cr0.contains(Cr0::TS) {
        return Err(Fault::Nm.into());
    }
    aligned(x, m, offset, LEGACY as u64, 64, access)
}

/// Bytes of an area with these components.
fn extent(cpu: &CpuState, components: u64, compact: bool) -> usize {
    let present = parts(cpu).into_iter().filter(|p| components & p.bit != 0);
    if compact {
        LEGACY + present.map(|p| p.size).sum::<usize>()
    } else {
        present.map(|p| p.at + p.size).fold(LEGACY, usize::max)
    }
}

/// Ranges of bytes in rising order; those that touch are one.
#[derive(Default)]
struct Runs {
    list: [Range<usize>; 9],
    count: usize,
}

impl Runs {
    fn add(&mut self, next: Range<usize>) {
        match self.list[..self.count].last_mut() {
            Some(last) if last.end == next.start => last.end = next.end,
            _ => {
                if let Some(free) = self.list.get_mut(self.count) {
                    *free = next;
                    self.count += 1;
                }
            }
        }
    }
}

/// XSAVE, XSAVEOPT and XSAVEC with their 64-bit forms.
pub fn xsave(x: &mut Exec<'_>, i: &Insn) -> Step {
    by_way_of_area(x, i, Access::Write, save)
}

/// Does what goes between memory and the CPU by way of an area, after the checks of the operand.
fn by_way_of_area(
    x: &mut Exec<'_>,
    i: &Insn,
    access: Access,
    go: impl FnOnce(&mut Exec<'_>, &Insn, (&MemRef, u64), &mut XsaveArea) -> Step,
) -> Step {
    let (m, offset) = memory(x, i)?;
    xsave_checks(x, &m, offset, access)?;
    let mut area = x.env.native.take_area();
    let done = go(x, i, (&m, offset), &mut area);
    x.env.native.give_area(area);
    done
}

/// XSAVE by way of `area`.
fn save(x: &mut Exec<'_>, i: &Insn, operand: (&MemRef, u64), area: &mut XsaveArea) -> Step {
    let area = &mut area.bytes;
    let compact = matches!(i.iced.mnemonic(), Mnemonic::Xsavec | Mnemonic::Xsavec64);
    let all = !compact && matches!(i.iced.mnemonic(), Mnemonic::Xsave | Mnemonic::Xsave64);
    let wanted = requested(x.cpu);
    legacy(x, is_64(i), &mut area[..LEGACY_REGION]);
    let mut used = in_use(x) & wanted;
    if !compact && xmm_is_zero(&x.cpu.xsave) {
        // SDM 2D XSAVE: MXCSR alone does not bring SSE state into use, as it does for XSAVEC.
        used &= !component::SSE;
    }
    let store = if all { wanted } else { used };

    let mut runs = Runs::default();
    let has_mxcsr = if compact { used & component::SSE } else { wanted & (component::SSE | component::AVX) };
    let [control, st] = X87_PARTS;
    let xmm = Layout::XMM..Layout::XMM + 16 * registers(x.cpu);
    for (stored, part) in [
        (store & component::X87, control),
        (has_mxcsr, MXCSR..MXCSR + 8),
        (store & component::X87, st),
        (store & component::SSE, xmm),
    ] {
        if stored != 0 {
            runs.add(part);
        }
    }
    let extent = extent(x.cpu, wanted, compact);
    let wants_mxcsr = wanted & if compact { component::SSE } else { component::SSE | component::AVX } != 0;
    let first = first_byte(wanted, wants_mxcsr);
    let to = Image::new(x, operand, extent, Access::Write);
    to.probe(x, &[extent - 1, first])?;
    let header_len = if compact {
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&used.to_le_bytes());
        area[XSTATE_BV + 8..XSTATE_BV + 16].copy_from_slice(&(wanted | COMPACT).to_le_bytes());
        16
    } else {
        let mut old = [0; 8];
        to.read(x, XSTATE_BV, &mut old)?;
        area[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&(u64::from_le_bytes(old) & !wanted | used).to_le_bytes());
        8
    };
    runs.add(XSTATE_BV..XSTATE_BV + header_len);
    let image = &x.cpu.xsave;
    let mut next = LEGACY;
    for p in parts(x.cpu) {
        let at = if compact { next } else { p.at };
        if wanted & p.bit != 0 {
            next += p.size;
        }
        if store & p.bit == 0 || p.used == 0 {
            continue;
        }
        let in_use = image.xstate_bv() & p.bit != 0;
        let bytes = if in_use { &image.bytes[p.at..p.at + p.used] } else { &ZEROS[..p.used] };
        area[at..at + p.used].copy_from_slice(bytes);
        runs.add(at..at + p.used);
    }
    // A processor looks at the whole area of the requested components, in use or not; Raptor Cove not at the legacy region if it is not.
    let start = if Vendor::host() == Vendor::Intel { first } else { 0 };
    to.check(x, start..extent)?;
    runs.list[..runs.count].iter().try_for_each(|r| to.write(x, r.start, &area[r.clone()]))
}

/// XRSTOR, XRSTOR64: both formats, with the checks of the header (SDM 1 13.8).
pub fn xrstor(x: &mut Exec<'_>, i: &Insn) -> Step {
    by_way_of_area(x, i, Access::Read, restore)
}

/// XRSTOR by way of `area`.
fn restore(x: &mut Exec<'_>, i: &Insn, operand: (&MemRef, u64), area: &mut XsaveArea) -> Step {
    let area = &mut area.bytes;
    let wanted = requested(x.cpu);
    let whole = extent(x.cpu, wanted, false);
    let from = Image::new(x, operand, whole, Access::Read);
    let intel = Vendor::host() == Vendor::Intel;
    // Raptor Cove looks at the header first, and at the legacy region only if anything of it is requested.
    from.probe(x, &[XSTATE_BV + 8])?;
    let header = if intel { XSTATE_BV } else { 0 };
    from.read(x, header, &mut area[header..LEGACY])?;
    let quad = |n: usize| u64::from_le_bytes(area[n..n + 8].try_into().expect("eight bytes"));
    let (bv, xcomp) = (quad(XSTATE_BV), quad(XSTATE_BV + 8));
    let compact = xcomp & COMPACT != 0;
    let bad = if compact {
        !x.env.cpu_model.supports(Code::Xsavec_mem)
            || xcomp & !COMPACT & !x.cpu.xcr0 != 0
            || bv & !xcomp != 0
            || area[XSTATE_BV + 16..LEGACY].iter().any(|&b| b != 0)
    } else {
        bv & !x.cpu.xcr0 != 0 || area[XSTATE_BV + 8..XSTATE_BV + 24].iter().any(|&b| b != 0)
    };
    if bad {
        return Err(Fault::Gp(0).into());
    }
    // Everything is looked at before anything changes: all that is requested, but of the compacted format only what is not initial.
    let mut looked_at = if compact { LEGACY } else { whole };
    let (mut next, mut read) = (LEGACY, LEGACY);
    for p in parts(x.cpu) {
        let at = if compact { next } else { p.at };
        if compact && xcomp & p.bit != 0 {
            next += p.size;
        }
        if wanted & bv & p.bit != 0 {
            read = read.max(at + p.size);
        }
    }
    looked_at = looked_at.max(read);
    if x.watching {
        read = looked_at;
    }
    let mut start = 0;
    if intel {
        let wants_mxcsr = wanted & if compact { component::SSE } else { component::SSE | component::AVX } != 0;
        start = first_byte(wanted, wants_mxcsr);
        from.probe(x, &[looked_at - 1, start])?;
        let legacy = area.get_mut(start..XSTATE_BV).unwrap_or_default();
        from.read(x, start, legacy)?;
    }
    from.check(x, start..looked_at)?;
    let rest = area.get_mut(LEGACY..read).ok_or(Fault::Gp(0))?;
    from.read(x, LEGACY, rest)?;
    let mxcsr = word(area, MXCSR);
    let loads_mxcsr =
        if compact { wanted & bv & component::SSE != 0 } else { wanted & (component::SSE | component::AVX) != 0 };
    if loads_mxcsr && mxcsr & !mxcsr_mask() != 0 {
        return Err(Fault::Gp(0).into());
    }
    if wanted & component::X87 != 0 {
        if bv & component::X87 != 0 {
            set_x87(x, area, is_64(i))?;
        } else {
            x.env.native.reset_x87(&mut x.cpu.xsave);
            if !x.cpu.cr0.contains(Cr0::NE) {
                // Nothing is pending any more.
                enter_x87(x, Needs::X87)?;
                x.env.native.reset_x87(&mut x.cpu.xsave);
            }
        }
    }
    let registers = registers(x.cpu);
    let long = registers == 16;
    let image = &mut x.cpu.xsave;
    if loads_mxcsr {
        image.set_mxcsr(mxcsr);
    } else if compact && wanted & component::SSE != 0 {
        image.set_mxcsr(0x1f80);
    }
    if wanted & component::SSE != 0 {
        let xmm = Layout::XMM..Layout::XMM + 16 * registers;
        let bytes = if bv & component::SSE == 0 { &ZEROS[..xmm.len()] } else { &area[xmm.clone()] };
        set_part(image, component::SSE, xmm, bytes, bv, long);
    }
    let mut next = LEGACY;
    for p in parts(x.cpu) {
        let at = if compact { next } else { p.at };
        if compact && xcomp & p.bit != 0 {
            next += p.size;
        }
        if wanted & p.bit == 0 {
            continue;
        }
        let bytes = if bv & p.bit == 0 { &ZEROS[..p.used] } else { &area[at..at + p.used] };
        set_part(&mut x.cpu.xsave, p.bit, p.at..p.at + p.used, bytes, bv, long || p.bit == component::OPMASK);
    }
    Ok(())
}

/// What is in the registers of a component that is initial.
static ZEROS: [u8; 1024] = [0; 1024];

/// Sets a component, or makes it initial; `whole`: the mode has all of it.
fn set_part(image: &mut XsaveArea, bit: u64, range: Range<usize>, bytes: &[u8], bv: u64, whole: bool) {
    if bv & bit == 0 && whole {
        let now = image.xstate_bv();
        image.set_xstate_bv(now & !bit);
    } else if !range.is_empty() {
        image.activate(bit);
        image.bytes[range].copy_from_slice(bytes);
    }
}
