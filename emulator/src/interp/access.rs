//! Loads and stores by segment and offset: segment check, alignment check, page walk (both pages of a crossing access before a byte is
//! written), then RAM, the bus, or the process's own memory (SDM 3A 5.3-5.5, 3.3.7.1, 6.15 interrupt 17).

use crate::cpu::{Attr, CpuState, Cr0, Cr4, Efer, Fault, Rflags, Segment};
use crate::interp::alu::Vendor;
use crate::interp::{Exec, Step, Stop, watch};
use crate::isa::{Seg, Width};
use crate::mem::{Access, By, FlatSpace, GuestMemory, Mmu, PAGE_SIZE, Prot};
use std::ops::Range;

/// Is the code 64-bit?
#[inline(always)]
pub fn is_long64(cpu: &CpuState) -> bool {
    cpu.efer.contains(Efer::LMA) && cpu.seg[Seg::Cs as usize].attr.contains(Attr::L)
}

/// User at CPL 3, else supervisor.
#[inline(always)]
pub fn accessor(cpu: &CpuState) -> By {
    if cpu.cpl() == 3 { By::User } else { By::Supervisor }
}

/// Bits 63:47 (63:56 with LA57) all equal (SDM 1 3.3.7.1).
#[inline(always)]
pub fn is_canonical(cpu: &CpuState, addr: u64) -> bool {
    let shift = if cpu.cr4.contains(Cr4::LA57) { 7 } else { 16 };
    ((addr << shift) as i64 >> shift) as u64 == addr
}

/// #SS(0) for the stack segment, #GP(0) for the others.
#[cold]
fn segment_fault(seg: Seg) -> Stop {
    if seg == Seg::Ss { Fault::Ss(0).into() } else { Fault::Gp(0).into() }
}

/// The linear address of `len` bytes at `seg:offset`, after the checks of segment limit and rights, or of canonical form.
///
/// # Errors
/// #SS(0) for SS (and operands based on rSP or rBP, whose default segment is SS), else #GP(0).
#[inline(always)]
pub fn linear(x: &Exec<'_>, seg: Seg, offset: u64, len: u64, access: Access) -> Result<u64, Stop> {
    if is_long64(x.cpu) {
        // SDM 1 3.4.2.1: in 64-bit mode CS, DS, ES and SS have base 0 and no limit.
        let addr = match seg {
            Seg::Fs | Seg::Gs => x.cpu.seg[seg as usize].base.wrapping_add(offset),
            _ => offset,
        };
        let last = addr.wrapping_add(len.wrapping_sub(1));
        if is_canonical(x.cpu, addr) && is_canonical(x.cpu, last) { Ok(addr) } else { Err(segment_fault(seg)) }
    } else {
        segmented(x.cpu, seg, offset, len, access)
    }
}

/// Segment limit and rights outside 64-bit mode (SDM 3A 5.3, 5.5; real mode: 3B 20.1).
fn segmented(cpu: &CpuState, seg: Seg, offset: u64, len: u64, access: Access) -> Result<u64, Stop> {
    let s = &cpu.seg[seg as usize];
    if !cpu.mode().is_real_like() && !rights_allow(s, access) {
        return Err(segment_fault(seg));
    }
    if !limit_allows(s, offset, len) {
        return Err(segment_fault(seg));
    }
    Ok(s.base.wrapping_add(offset) & 0xffff_ffff)
}

/// SDM 3A 5.5: a null selector, a write to code or read-only data, a read of execute-only code.
fn rights_allow(s: &Segment, access: Access) -> bool {
    if s.attr.contains(Attr::UNUSABLE) {
        return false;
    }
    let code = s.attr.contains(Attr::CODE);
    let bit = s.attr.contains(Attr::WRITABLE);
    match access {
        Access::Read => !code || bit,
        Access::Write => !code && bit,
        // Checked when CS was loaded; between MOV CR0 and the far JMP CS still holds what real mode loaded, which is data by its type.
        Access::Execute => true,
    }
}

/// SDM 3A 5.3. What runs past a limit of 4 GiB may fault or wrap, says the manual. On Zen 4 it faults; on Raptor Cove it wraps in a flat
/// segment, that is with base 0, and faults in others.
pub(crate) fn limit_allows(s: &Segment, offset: u64, len: u64) -> bool {
    let limit = u64::from(s.limit);
    let last = offset + len.wrapping_sub(1).min(u64::from(u32::MAX));
    let expand_down = s.attr.contains(Attr::S | Attr::EXPAND_DOWN) && !s.attr.contains(Attr::CODE);
    if expand_down {
        let top = if s.attr.contains(Attr::DB) { 0xffff_ffff } else { 0xffff };
        return offset > limit && last <= top;
    }
    last <= limit || s.limit == u32::MAX && s.base == 0 && Vendor::host() == Vendor::Intel
}

/// [`linear`], and SDM 3A 6.15, interrupt 17: CR0.AM, RFLAGS.AC, CPL 3, data not aligned to `to` bytes.
///
/// # Errors
/// As there, and #AC.
#[inline(always)]
pub fn linear_aligned(x: &Exec<'_>, seg: Seg, offset: u64, len: u64, to: u64, access: Access) -> Result<u64, Stop> {
    let found = linear(x, seg, offset, len, access);
    if !x.cpu.rflags.contains(Rflags::AC) || !checks_alignment(x.cpu) {
        return found;
    }
    let first = match &found {
        Ok(first) => *first,
        // Raptor Cove looks at the alignment before it looks whether the operand's end is canonical.
        Err(_) if is_long64(x.cpu) && Vendor::host() == Vendor::Intel => linear(x, seg, offset, 1, access)?,
        Err(_) => return found,
    };
    if first & (to - 1) != 0 { Err(Fault::Ac.into()) } else { found }
}

/// Does misaligned data give #AC?
pub fn checks_alignment(cpu: &CpuState) -> bool {
    cpu.rflags.contains(Rflags::AC) && cpu.cr0.contains(Cr0::AM) && cpu.cpl() == 3
}

/// A translated range of at most a page: guest-physical addresses of its one or two parts.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Linear address of the first byte.
    pub laddr: u64,
    /// Guest-physical address of the first byte.
    pub first: u64,
    /// Bytes in the first page, and where the rest is; `None` if the range is inside one page.
    pub second: Option<(u64, u64)>,
    /// What it was translated for: the read of a read-modify-write faults as a write.
    pub access: Access,
}

#[inline(always)]
fn crosses(laddr: u64, len: u64) -> bool {
    (laddr & (PAGE_SIZE - 1)) + len > PAGE_SIZE
}

/// Translates `len` (1 to 4096) bytes at `laddr`, both pages if it crosses.
#[inline(always)]
pub(crate) fn place(x: &mut Exec<'_>, laddr: u64, len: u64, access: Access, by: By) -> Result<Place, Stop> {
    if x.watching && by != By::Implicit {
        watch::data(x, laddr, len, access);
    }
    if crosses(laddr, len) {
        return place_two(x, laddr, access, by);
    }
    let first = x.mmu.translate(x.cpu, x.mem, laddr, access, by)?;
    Ok(Place { laddr, first, second: None, access })
}

#[cold]
fn place_two(x: &mut Exec<'_>, laddr: u64, access: Access, by: By) -> Result<Place, Stop> {
    let first = x.mmu.translate(x.cpu, x.mem, laddr, access, by)?;
    let mut next = (laddr | (PAGE_SIZE - 1)).wrapping_add(1);
    if !is_long64(x.cpu) {
        next &= 0xffff_ffff;
    }
    let second = x.mmu.translate(x.cpu, x.mem, next, access, by)?;
    Ok(Place { laddr, first, second: Some((PAGE_SIZE - (laddr & (PAGE_SIZE - 1)), second)), access })
}

/// What the hot loop knows of the state, until an instruction comes that may change it: integer accesses of 64-bit code without
/// alignment checks, of which only the address is left to look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Lane {
    open: bool,
    /// Linear addresses go through the TLB, of which this is the context.
    paged: Option<usize>,
}

impl Lane {
    /// Of the state as it is; closed unless the code is 64-bit, and where accesses are counted.
    #[inline(always)]
    pub fn of(cpu: &CpuState, mem: &GuestMemory, mmu: &Mmu) -> Lane {
        // AC at CPL 0 is STAC's: the TLB's context knows of it, and nothing else asks.
        let open = is_long64(cpu) && !mmu.counts() && !checks_alignment(cpu) && !cpu.cr4.contains(Cr4::LA57);
        let paged = (mem.flat().is_none() && cpu.cr0.contains(Cr0::PG)).then(|| Mmu::context(cpu, accessor(cpu)));
        Lane { open, paged }
    }

    /// Is the code known to be 64-bit?
    #[inline(always)]
    pub fn is_open(self) -> bool {
        self.open
    }
}

/// Linear and guest-physical address if nothing is in the way: the lane is open, the address canonical, the bytes inside one page, the page
/// known to the TLB.
#[inline(always)]
fn quick(x: &Exec<'_>, seg: Seg, offset: u64, w: Width, access: Access) -> Option<(u64, u64)> {
    if !x.lane.open {
        return None;
    }
    let laddr = match seg {
        Seg::Fs | Seg::Gs => x.cpu.seg[seg as usize].base.wrapping_add(offset),
        _ => offset,
    };
    if ((laddr << 16) as i64 >> 16) as u64 != laddr || crosses(laddr, w.bytes()) {
        return None;
    }
    let gpa = match x.lane.paged {
        None => laddr,
        Some(context) => x.mmu.known(context, laddr, access)?,
    };
    Some((laddr, gpa))
}

/// All checks of an integer access, translated: for read-modify-write.
///
/// # Errors
/// Every fault the access can give in a machine.
#[inline(always)]
pub fn place_for(x: &mut Exec<'_>, seg: Seg, offset: u64, w: Width, access: Access) -> Result<Place, Stop> {
    match quick(x, seg, offset, w, access) {
        Some((laddr, first)) => Ok(Place { laddr, first, second: None, access }),
        None => full_place(x, seg, offset, w, access),
    }
}

#[inline(never)]
fn full_place(x: &mut Exec<'_>, seg: Seg, offset: u64, w: Width, access: Access) -> Result<Place, Stop> {
    let laddr = linear_aligned(x, seg, offset, w.bytes(), w.bytes(), access)?;
    let by = accessor(x.cpu);
    place(x, laddr, w.bytes(), access, by)
}

/// Loads from a translated place.
///
/// # Errors
/// The page fault of a flat memory.
#[inline(always)]
pub fn load_at(x: &mut Exec<'_>, p: &Place, w: Width) -> Result<u64, Stop> {
    if p.second.is_none()
        && let Some(v) = x.mem.load(p.first, w)
    {
        return Ok(v);
    }
    let mut bytes = [0; 8];
    let bytes = &mut bytes[..w.bytes() as usize];
    read_place(x, p, bytes)?;
    Ok(from_le(bytes))
}

/// Stores to a translated place.
///
/// # Errors
/// The page fault of a flat memory.
#[inline(always)]
pub fn store_at(x: &mut Exec<'_>, p: &Place, w: Width, v: u64) -> Step {
    if p.second.is_none() && x.mem.store(p.first, w, v).is_some() {
        return Ok(());
    }
    write_place(x, p, &v.to_le_bytes()[..w.bytes() as usize])
}

/// Compare-and-exchange at a translated place: gives what was found. Atomic inside a page of RAM; across pages and on the bus it is a
/// load and a store (split locks between vCPUs are not offered).
///
/// # Errors
/// The page fault of a flat memory.
pub fn compare_exchange_at(x: &mut Exec<'_>, p: &Place, w: Width, old: u64, new: u64) -> Result<u64, Stop> {
    // In the process's own memory the host CPU does split locks by itself.
    if (p.second.is_none() || x.mem.flat().is_some())
        && let Some(found) = x.mem.compare_exchange(p.first, w, old, new)
    {
        return Ok(found);
    }
    let found = load_at(x, p, w)?;
    if found == w.cut(old) {
        store_at(x, p, w, new)?;
    }
    Ok(found)
}

fn from_le(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

/// Reads bytes of a translated place; what is no RAM is asked on the bus.
#[cold]
fn read_place(x: &mut Exec<'_>, p: &Place, to: &mut [u8]) -> Step {
    if let Some(flat) = x.mem.flat() {
        return flat.read(p.laddr, to).ok_or_else(|| flat_fault(x, flat, p.laddr, to.len() as u64, p.access));
    }
    let cut = p.second.map_or(to.len(), |(n, _)| n as usize).min(to.len());
    let (a, b) = to.split_at_mut(cut);
    read_part(x, p.first, a);
    if let Some((_, second)) = p.second {
        read_part(x, second, b);
    }
    Ok(())
}

fn read_part(x: &mut Exec<'_>, gpa: u64, to: &mut [u8]) {
    if x.mem.read(gpa, to).is_some() {
        return;
    }
    x.attention();
    for (at, part) in bus_parts(gpa, to.len()) {
        x.bus.read_mmio(gpa + at as u64, &mut to[at..at + part]);
    }
}

/// Writes bytes of a translated place.
#[cold]
fn write_place(x: &mut Exec<'_>, p: &Place, from: &[u8]) -> Step {
    if let Some(flat) = x.mem.flat() {
        return write_flat(x, flat, p.laddr, from);
    }
    let cut = p.second.map_or(from.len(), |(n, _)| n as usize).min(from.len());
    let (a, b) = from.split_at(cut);
    write_part(x, p.first, a);
    if let Some((_, second)) = p.second {
        write_part(x, second, b);
    }
    Ok(())
}

fn write_part(x: &mut Exec<'_>, gpa: u64, from: &[u8]) {
    if x.mem.write(gpa, from).is_some() {
        return;
    }
    x.attention();
    for (at, part) in bus_parts(gpa, from.len()) {
        x.bus.write_mmio(gpa + at as u64, &from[at..at + part]);
    }
}

/// Cuts a bus access into naturally aligned pieces of at most 8 bytes: offset and length.
fn bus_parts(gpa: u64, len: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let left = len - at;
        if left == 0 {
            return None;
        }
        // A whole power of two goes as one access even if misaligned; a rest is cut.
        let part = if at == 0 && left.is_power_of_two() && left <= 8 {
            left
        } else {
            let aligned = 1usize << (gpa + at as u64).trailing_zeros().min(3);
            aligned.min(1 << left.ilog2())
        };
        at += part;
        Some((at - part, part))
    })
}

/// Writes to the process's own memory, all or nothing as far as the list of mappings can tell.
fn write_flat(x: &Exec<'_>, flat: &FlatSpace, laddr: u64, from: &[u8]) -> Step {
    let len = from.len() as u64;
    let page = laddr & !(PAGE_SIZE - 1);
    if crosses(laddr, len)
        && [page, page.wrapping_add(PAGE_SIZE)]
            .iter()
            .any(|&p| !flat.find(p).is_some_and(|v| v.prot.contains(Prot::WRITE)))
    {
        return Err(flat_fault(x, flat, laddr, len, Access::Write));
    }
    flat.write(laddr, from).ok_or_else(|| flat_fault(x, flat, laddr, len, Access::Write))
}

/// The page fault of an access that the host refused. The address is the first byte of the access in the page that refused.
#[cold]
fn flat_fault(x: &Exec<'_>, flat: &FlatSpace, laddr: u64, len: u64, access: Access) -> Stop {
    let right = match access {
        Access::Read => Prot::READ,
        Access::Write => Prot::WRITE,
        Access::Execute => Prot::EXEC,
    };
    let refused = |page: u64| match flat.find(page) {
        // A mapping with the right may still refuse: behind the end of its file. Reading tells.
        Some(v) => !v.prot.contains(right) || flat.load(page, Width::B).is_none(),
        None => true,
    };
    let next = (laddr | (PAGE_SIZE - 1)).wrapping_add(1);
    let addr = if crosses(laddr, len) && !refused(laddr) && refused(next) { next } else { laddr };
    // Linux says of its own half, which the guest could not map, that a page is there (arch/x86/mm/fault.c hides which are).
    const TASK_SIZE_MAX: u64 = 0x7fff_ffff_f000;
    // A page without rights is not present (PROT_NONE).
    let present = addr >= TASK_SIZE_MAX || flat.find(addr).is_some_and(|v| !v.prot.is_empty());
    let mut code = u16::from(present);
    code |= match access {
        Access::Read => 0,
        Access::Write => 2,
        Access::Execute => 16,
    };
    if x.cpu.cpl() == 3 {
        code |= 4;
    }
    Fault::Pf { addr, code }.into()
}

/// The page fault of an instruction fetch from a flat memory.
pub(crate) fn flat_fetch_fault(x: &Exec<'_>, flat: &FlatSpace, laddr: u64) -> Stop {
    flat_fault(x, flat, laddr, 1, Access::Execute)
}

/// Loads an integer, zero-extended.
///
/// # Errors
/// #GP, #SS, #AC, #PF.
#[inline(always)]
pub fn load(x: &mut Exec<'_>, seg: Seg, offset: u64, w: Width) -> Result<u64, Stop> {
    if let Some((_, gpa)) = quick(x, seg, offset, w, Access::Read)
        && let Some(v) = x.mem.load(gpa, w)
    {
        return Ok(v);
    }
    full_load(x, seg, offset, w)
}

#[inline(never)]
fn full_load(x: &mut Exec<'_>, seg: Seg, offset: u64, w: Width) -> Result<u64, Stop> {
    let p = full_place(x, seg, offset, w, Access::Read)?;
    load_at(x, &p, w)
}

/// Stores an integer. Nothing is written unless all of it can be.
///
/// # Errors
/// #GP, #SS, #AC, #PF.
#[inline(always)]
pub fn store(x: &mut Exec<'_>, seg: Seg, offset: u64, w: Width, v: u64) -> Step {
    if let Some((_, gpa)) = quick(x, seg, offset, w, Access::Write)
        && x.mem.store(gpa, w, v).is_some()
    {
        return Ok(());
    }
    full_store(x, seg, offset, w, v)
}

#[inline(never)]
fn full_store(x: &mut Exec<'_>, seg: Seg, offset: u64, w: Width, v: u64) -> Step {
    let p = full_place(x, seg, offset, w, Access::Write)?;
    store_at(x, &p, w, v)
}

/// Reads up to 4096 bytes; alignment is the caller's.
///
/// # Errors
/// #GP, #SS, #PF.
pub fn read_bytes(x: &mut Exec<'_>, seg: Seg, offset: u64, to: &mut [u8]) -> Step {
    if to.is_empty() {
        return Ok(());
    }
    let laddr = linear(x, seg, offset, to.len() as u64, Access::Read)?;
    read_linear(x, laddr, to)
}

/// The same (a byte or more) at a linear address.
///
/// # Errors
/// #PF.
pub fn read_linear(x: &mut Exec<'_>, laddr: u64, to: &mut [u8]) -> Step {
    let by = accessor(x.cpu);
    let p = place(x, laddr, to.len() as u64, Access::Read, by)?;
    read_place(x, &p, to)
}

/// Writes up to 4096 bytes; nothing is written unless all of it can be.
///
/// # Errors
/// #GP, #SS, #PF.
pub fn write_bytes(x: &mut Exec<'_>, seg: Seg, offset: u64, from: &[u8]) -> Step {
    if from.is_empty() {
        return Ok(());
    }
    let laddr = linear(x, seg, offset, from.len() as u64, Access::Write)?;
    write_linear(x, laddr, from)
}

/// The same (a byte or more) at a linear address.
///
/// # Errors
/// #PF.
pub fn write_linear(x: &mut Exec<'_>, laddr: u64, from: &[u8]) -> Step {
    let by = accessor(x.cpu);
    let p = place(x, laddr, from.len() as u64, Access::Write, by)?;
    write_place(x, &p, from)
}

/// The guest-physical address of `len` bytes inside one page that can be accessed without a fault; `None` if anything is in the way.
/// For fast paths: the slow way finds out what.
pub fn whole(x: &mut Exec<'_>, seg: Seg, offset: u64, len: u64, access: Access) -> Option<u64> {
    let laddr = linear(x, seg, offset, len, access).ok()?;
    let by = accessor(x.cpu);
    if crosses(laddr, len) || x.watching {
        return None;
    }
    x.mmu.translate(x.cpu, x.mem, laddr, access, by).ok()
}

/// Bytes on one or two pages that the TLB knows, so that no access to them faults.
pub struct Known {
    first: u64,
    /// So many of them are on the first page.
    cut: usize,
    second: u64,
    len: usize,
}

/// `len` (at most 4096) bytes, if they are known to the TLB and nothing else is in the way either. For fast paths, as [`whole`] is; nothing
/// has changed if there are none.
pub fn known(x: &Exec<'_>, seg: Seg, offset: u64, len: usize, access: Access) -> Option<Known> {
    let context = x.lane.paged.filter(|_| x.lane.open && !x.watching)?;
    let laddr = linear(x, seg, offset, len as u64, access).ok()?;
    let first = x.mmu.known(context, laddr, access)?;
    let cut = (PAGE_SIZE - laddr % PAGE_SIZE) as usize;
    let second = if cut < len { x.mmu.known(context, laddr.wrapping_add(cut as u64), access)? } else { 0 };
    Some(Known { first, cut, second, len })
}

impl Known {
    /// Are all of these among them?
    pub fn has(&self, bytes: Range<usize>) -> bool {
        bytes.end <= self.len
    }

    /// The parts on either page of `len` bytes from `at` on: how many are on the first, and where both parts are.
    fn parts(&self, at: usize, len: usize) -> (usize, u64, u64) {
        let first = self.cut.saturating_sub(at).min(len);
        (first, self.first + at as u64, self.second + (at + first).saturating_sub(self.cut) as u64)
    }

    /// Reads from byte `at` on.
    pub fn read(&self, x: &mut Exec<'_>, at: usize, to: &mut [u8]) {
        let (cut, first, second) = self.parts(at, to.len());
        let (a, b) = to.split_at_mut(cut);
        for (gpa, part) in [(first, a), (second, b)] {
            if !part.is_empty() {
                read_part(x, gpa, part);
            }
        }
    }

    /// Writes from byte `at` on.
    pub fn write(&self, x: &mut Exec<'_>, at: usize, from: &[u8]) {
        let (cut, first, second) = self.parts(at, from.len());
        let (a, b) = from.split_at(cut);
        for (gpa, part) in [(first, a), (second, b)] {
            if !part.is_empty() {
                write_part(x, gpa, part);
            }
        }
    }
}

/// All faults of a later write of `len` (at most 4096) bytes; nothing is written.
///
/// # Errors
/// #GP, #SS, #PF.
pub fn check_write(x: &mut Exec<'_>, seg: Seg, offset: u64, len: u64) -> Step {
    check(x, seg, offset, len, Access::Write)
}

/// All faults of a later integer access, alignment included.
///
/// # Errors
/// #GP, #SS, #AC, #PF.
pub fn check_integer(x: &mut Exec<'_>, seg: Seg, offset: u64, w: Width, access: Access) -> Step {
    linear_aligned(x, seg, offset, w.bytes(), w.bytes(), access)?;
    check(x, seg, offset, w.bytes(), access)
}

/// All faults of a later access of `len` (at most 4096) bytes; no byte is touched.
///
/// # Errors
/// #GP, #SS, #PF.
pub fn check(x: &mut Exec<'_>, seg: Seg, offset: u64, len: u64, access: Access) -> Step {
    if len == 0 {
        return Ok(());
    }
    let laddr = linear(x, seg, offset, len, access)?;
    check_linear(x, laddr, len, access)
}

/// The same (a byte or more) at a linear address.
///
/// # Errors
/// #PF.
pub fn check_linear(x: &mut Exec<'_>, laddr: u64, len: u64, access: Access) -> Step {
    if let Some(flat) = x.mem.flat() {
        let last = laddr.wrapping_add(len - 1);
        let there = |a: u64| {
            flat.load(a, Width::B).is_some()
                && (access == Access::Read || flat.find(a).is_some_and(|v| v.prot.contains(Prot::WRITE)))
        };
        return if there(laddr) && there(last) { Ok(()) } else { Err(flat_fault(x, flat, laddr, len, access)) };
    }
    let by = accessor(x.cpu);
    // Not an access yet.
    let hits = x.hits;
    let done = place(x, laddr, len, access, by).map(|_| ());
    x.hits = hits;
    done
}

/// Loads as the processor itself does for descriptor tables, TSS and IDT: supervisor, whatever the CPL.
///
/// # Errors
/// #PF.
pub fn load_system(x: &mut Exec<'_>, laddr: u64, w: Width) -> Result<u64, Stop> {
    let p = place(x, laddr, w.bytes(), Access::Read, By::Implicit)?;
    load_at(x, &p, w)
}

/// Stores as the processor itself does.
///
/// # Errors
/// #PF.
pub fn store_system(x: &mut Exec<'_>, laddr: u64, w: Width, v: u64) -> Step {
    let p = place(x, laddr, w.bytes(), Access::Write, By::Implicit)?;
    store_at(x, &p, w, v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interp::testing::{CODE, Machine};
    use crate::isa::Gpr;
    use crate::vcpu::Exit;

    /// SDM 3A 5.3: first and last byte; of an expand-down segment all but what the limit leaves out, up to 64 KiB or 4 GiB.
    #[test]
    fn limits_upwards_and_expand_down() {
        let data = Attr::from_bits_retain(0x93);
        let rows: [(Attr, u32, u64, u64, bool); 13] = [
            (data, 0xffff, 0xffff, 1, true),
            (data, 0xffff, 0xffff, 2, false),
            (data, 0xfff, 0x0ffd, 4, false),
            (data, 0xfff, 0x0ffc, 4, true),
            (data, 0xffff_ffff, 0xffff_fffc, 4, true),
            (data, 0xffff_ffff, 0xffff_fffd, 4, false),
            (data | Attr::EXPAND_DOWN, 0xfff, 0xfff, 1, false),
            (data | Attr::EXPAND_DOWN, 0xfff, 0x1000, 4, true),
            (data | Attr::EXPAND_DOWN, 0xfff, 0xfffe, 2, true),
            (data | Attr::EXPAND_DOWN, 0xfff, 0xffff, 2, false),
            (data | Attr::EXPAND_DOWN | Attr::DB, 0xfff, 0xffff, 2, true),
            (data | Attr::EXPAND_DOWN | Attr::DB, 0xfff, 0xffff_fffc, 4, true),
            (data | Attr::EXPAND_DOWN | Attr::DB, 0xfff, 0xffff_fffd, 4, false),
        ];
        for (attr, limit, offset, len, allowed) in rows {
            let s = Segment { attr, limit, base: 0x1000, ..Segment::default() };
            assert_eq!(limit_allows(&s, offset, len), allowed, "{attr:?} {limit:#x}: {len} bytes at {offset:#x}");
            // The vendors differ where the segment is flat.
            let flat = attr == data && limit == u32::MAX && Vendor::host() == Vendor::Intel;
            let s = Segment { base: 0, ..s };
            assert_eq!(
                limit_allows(&s, offset, len),
                allowed || flat,
                "{attr:?} {limit:#x}: {len} bytes at {offset:#x}"
            );
        }
    }

    /// A limit that protected mode left stays in real mode, whatever is loaded there (SDM 3B 20.1.1).
    #[test]
    fn unreal_mode_reaches_beyond_64_kib() {
        // mov ds, ax; mov dx, [ebx]
        let code = [0x8e, 0xd8, 0x67, 0x8b, 0x13];
        for (limit, end) in [(0xffff, Exit::Exception(Fault::Gp(0))), (0xffff_ffff, Exit::Budget)] {
            let mut m = Machine::real(&code);
            m.cpu().seg[Seg::Ds as usize].limit = limit;
            m.cpu().gpr[Gpr::Rax as usize] = 0x100;
            m.cpu().gpr[Gpr::Rbx as usize] = 0x2_0000;
            m.mem.store(0x2_1000, Width::W, 0x1234).expect("RAM");
            assert_eq!((m.run(1), m.cpu().rip), (Exit::Budget, CODE + 2));
            assert_eq!(m.run(1), end, "{limit:#x}");
            assert_eq!(m.cpu().gpr[Gpr::Rdx as usize] & 0xffff, if end == Exit::Budget { 0x1234 } else { 0 });
        }
    }
}
