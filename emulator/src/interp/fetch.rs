//! From RIP to a decoded instruction: the cached page, or byte by byte where nothing is cached (SDM 3A 6.15 interrupts 13 and 14;
//! SDM 2A 2.3.11).

use crate::cpu::{CpuState, Fault};
use crate::interp::access::{self, is_long64};
use crate::interp::alu::Vendor;
use crate::interp::icache::{Entry, ICache, Page};
use crate::interp::{Exec, Stop};
use crate::isa::{DecodeError, Insn, MAX_INSN_LEN, Seg, decode};
use crate::mem::{Access, By, PAGE_SIZE};

/// What a fetch depends on besides the address.
#[derive(Clone, Copy)]
pub struct Context {
    /// 16, 32 or 64.
    pub bitness: u32,
    by: By,
    /// What RIP is cut to.
    pub mask: u64,
}

impl Context {
    /// Of the state as it is.
    #[inline(always)]
    pub fn of(cpu: &CpuState) -> Context {
        let bitness = if is_long64(cpu) { 64 } else { cpu.mode().bitness() };
        Context { bitness, by: access::accessor(cpu), mask: if bitness == 64 { u64::MAX } else { 0xffff_ffff } }
    }

    /// For the cache: code size in the low two bits, then who fetches.
    fn key(self) -> u64 {
        u64::from(self.bitness / 32) | u64::from(self.by == By::User) << 2
    }
}

/// A cached page that RIP is in.
pub struct Window<'a> {
    /// The page.
    pub page: &'a mut Page,
    /// RIP of its first byte.
    pub base: u64,
}

/// The cached page that holds RIP; `None` if the instruction must be fetched by itself: no RAM there, or the page is cut by the limit
/// of CS.
///
/// # Errors
/// #GP, #PF of the fetch.
#[inline(always)]
pub fn window<'a>(x: &mut Exec<'_>, cache: &'a mut ICache, context: Context) -> Result<Option<Window<'a>>, Stop> {
    let rip = x.cpu.rip;
    let laddr = if context.bitness == 64 { rip } else { x.cpu.segment(Seg::Cs).base.wrapping_add(rip) & 0xffff_ffff };
    let linear_page = laddr & !(PAGE_SIZE - 1);
    let base = rip.wrapping_sub(laddr - linear_page);
    if context.bitness != 64 && !whole_page_inside_limit(x.cpu, base) {
        return Ok(None);
    }
    let generation = x.mmu.generation();
    let key = context.key();
    let n = match cache.at_linear(x.mem, linear_page, key, generation) {
        Some(n) => Some(n),
        None => find(x, cache, context, linear_page)?,
    };
    Ok(n.and_then(|n| cache.page(n)).map(|page| Window { page, base }))
}

#[cold]
fn find(x: &mut Exec<'_>, cache: &mut ICache, context: Context, linear_page: u64) -> Result<Option<u32>, Stop> {
    let laddr = fetch_address(x, x.cpu.rip)?;
    let gpa = x.mmu.translate(x.cpu, x.mem, laddr, Access::Execute, context.by)?;
    if let Some(flat) = x.mem.flat()
        && !x.mem.may_execute(gpa)
    {
        return Err(access::flat_fetch_fault(x, flat, laddr));
    }
    let generation = x.mmu.generation();
    let page = cache.at_physical(x.mem, gpa, linear_page, context.key(), generation);
    match (page, x.mem.flat()) {
        (Some(n), _) => Ok(Some(n)),
        (None, Some(flat)) => Err(access::flat_fetch_fault(x, flat, laddr)),
        (None, None) => Ok(None),
    }
}

fn whole_page_inside_limit(cpu: &CpuState, base: u64) -> bool {
    // A base below zero is a page that begins before offset 0.
    let last = (base as i64).wrapping_add(PAGE_SIZE as i64 - 1);
    last <= i64::from(cpu.segment(Seg::Cs).limit)
}

/// The instruction at RIP, which is in the window but not in its table: decodes it and, if it lies in the page as a whole, puts it
/// into the table and gives `None`; else gives the instruction to execute now.
///
/// # Errors
/// #UD, #GP, #PF.
#[cold]
#[inline(never)]
pub fn decode_in(x: &mut Exec<'_>, page: &mut Page, offset: usize, context: Context) -> Result<Option<Entry>, Stop> {
    match decode(page.bytes(offset), context.bitness) {
        Ok(insn) => {
            page.put(offset, Entry::new(insn, x));
            Ok(None)
        }
        Err(DecodeError::Invalid) => Err(Fault::Ud.into()),
        Err(DecodeError::TooLong) => Err(Fault::Gp(0).into()),
        Err(DecodeError::Truncated) => crossing(x, page, offset, context).map(Some),
    }
}

/// An instruction that goes on in the next page: kept too, together with where that page was.
fn crossing(x: &mut Exec<'_>, page: &mut Page, offset: usize, context: Context) -> Result<Entry, Stop> {
    let rest = x.cpu.rip.wrapping_add(PAGE_SIZE - offset as u64);
    let laddr = fetch_address(x, rest)?;
    let next_gpa = x.mmu.translate(x.cpu, x.mem, laddr, Access::Execute, context.by)?;
    if let Some(entry) = page.get_crossing(x.mem, offset, next_gpa) {
        return Ok(entry.clone());
    }
    x.mem.watch_code(next_gpa);
    let generation = x.mem.code_generation(next_gpa);
    let entry = Entry::new(fetch(x, context)?, x);
    page.put_crossing(offset, next_gpa, generation, entry.clone());
    Ok(entry)
}

/// Fetches and decodes the instruction at RIP without the cache. Only bytes that belong to it can fault.
///
/// # Errors
/// #UD, #GP, #PF.
pub fn fetch(x: &mut Exec<'_>, context: Context) -> Result<Insn, Stop> {
    let mut bytes = [0; MAX_INSN_LEN];
    let mut n = 0;
    while n < MAX_INSN_LEN {
        let in_page = fetch_part(x, context, n, &mut bytes);
        match in_page {
            Ok(more) => n += more,
            // The bytes before may be a whole instruction.
            Err(stop) => return decided(&bytes[..n], context.bitness).unwrap_or(Err(stop)),
        }
    }
    decided(&bytes, context.bitness).unwrap_or(Err(Fault::Gp(0).into()))
}

/// Fetches from byte `n` of the instruction to the end of the page or of the limit; gives how many bytes.
fn fetch_part(x: &mut Exec<'_>, context: Context, n: usize, bytes: &mut [u8; MAX_INSN_LEN]) -> Result<usize, Stop> {
    let offset = x.cpu.rip.wrapping_add(n as u64);
    let laddr = fetch_address(x, offset)?;
    let mut len = ((PAGE_SIZE - laddr % PAGE_SIZE) as usize).min(MAX_INSN_LEN - n);
    if context.bitness != 64 {
        let before_limit = u64::from(x.cpu.segment(Seg::Cs).limit).saturating_sub(offset).saturating_add(1);
        len = len.min(before_limit as usize);
    }
    let to = &mut bytes[n..n + len];
    let gpa = x.mmu.translate(x.cpu, x.mem, laddr, Access::Execute, context.by)?;
    if let Some(flat) = x.mem.flat() {
        if !(x.mem.may_execute(gpa) && flat.read(gpa, to).is_some()) {
            return Err(access::flat_fetch_fault(x, flat, laddr));
        }
    } else if x.mem.read(gpa, to).is_none() {
        for (n, byte) in to.iter_mut().enumerate() {
            x.bus.read_mmio(gpa + n as u64, std::slice::from_mut(byte));
        }
    }
    Ok(len)
}

fn fetch_address(x: &Exec<'_>, offset: u64) -> Result<u64, Stop> {
    // Code that runs over the end of a segment of 4 GiB goes on at offset 0, whatever its base (Raptor Cove).
    let wraps = offset >> 32 != 0
        && !is_long64(x.cpu)
        && x.cpu.segment(Seg::Cs).limit == u32::MAX
        && Vendor::host() == Vendor::Intel;
    let offset = if wraps { offset & 0xffff_ffff } else { offset };
    // Beyond the limit of CS, or not canonical: #GP(0).
    access::linear(x, Seg::Cs, offset, 1, Access::Execute).map_err(|_| Fault::Gp(0).into())
}

/// What the bytes say: an instruction, #UD, #GP for too long; `None` if more bytes are needed.
fn decided(bytes: &[u8], bitness: u32) -> Option<Result<Insn, Stop>> {
    match decode(bytes, bitness) {
        Ok(i) => Some(Ok(i)),
        Err(DecodeError::Invalid) => Some(Err(Fault::Ud.into())),
        Err(DecodeError::TooLong) => Some(Err(Fault::Gp(0).into())),
        Err(DecodeError::Truncated) => None,
    }
}
