//! Where executable memory lies. What this process makes executable takes addresses that differ from each other modulo [`PERIOD`].
//!
//! The translator's indirect branches add to a code address a multiple of [`PERIOD`] that is 0 if the branch is foreseen and anything
//! else if it is not. The sum then is the code, or no executable memory at all: it faults.
#![allow(unsafe_code)]

use crate::host::reserved::Reserved;
use std::ffi::c_void;
use std::io::{Error, ErrorKind, Result};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, OnceLock};

/// 2 GiB: more than the code of any engine.
pub const PERIOD: u64 = 1 << 31;

/// The page of vsyscall(2), which Linux may execute for a process.
const VSYSCALL: Range<u64> = 0xffff_ffff_ff60_0000..0xffff_ffff_ff60_1000;

/// What is taken, modulo [`PERIOD`]; a range that goes over its end stands twice.
fn taken() -> MutexGuard<'static, Vec<Range<u64>>> {
    static TAKEN: OnceLock<Mutex<Vec<Range<u64>>>> = OnceLock::new();
    TAKEN.get_or_init(|| Mutex::new(of_the_program())).lock().expect("no panic under the lock")
}

/// While the process forks, so that the child finds the lock free.
pub fn lock_for_fork() -> impl Drop {
    taken()
}

/// The executable segments of the program, its libraries and the vDSO.
fn of_the_program() -> Vec<Range<u64>> {
    extern "C" fn each(info: *mut libc::dl_phdr_info, _: usize, data: *mut c_void) -> i32 {
        // SAFETY: dl_iterate_phdr(3) gives one object's headers, and what it was called with.
        let (info, all, headers) = unsafe {
            let info = &*info;
            let headers = std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into());
            (info, &mut *data.cast::<Vec<Range<u64>>>(), headers)
        };
        for h in headers.iter().filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_X != 0) {
            let start = info.dlpi_addr.wrapping_add(h.p_vaddr);
            all.extend(residues(start & !4095, (start & 4095) + h.p_memsz));
        }
        0
    }
    let mut all: Vec<Range<u64>> = residues(VSYSCALL.start, VSYSCALL.end - VSYSCALL.start).collect();
    // SAFETY: the callback gets the vector, and keeps nothing.
    unsafe { libc::dl_iterate_phdr(Some(each), (&raw mut all).cast()) };
    all
}

/// Whole pages of a range modulo [`PERIOD`].
fn residues(start: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
    let (first, len) = (start % PERIOD, len.next_multiple_of(4096).min(PERIOD));
    let end = first + len;
    [first..end.min(PERIOD), 0..end.saturating_sub(PERIOD)].into_iter().filter(|r| !r.is_empty())
}

/// How far below `start` a range would have to begin to end where something begins that it now shares addresses with.
fn over(taken: &[Range<u64>], start: u64, len: u64) -> Option<u64> {
    residues(start, len).find_map(|r| {
        let t = taken.iter().find(|t| t.start < r.end && r.start < t.end)?;
        Some((start % PERIOD + len - t.start) % PERIOD)
    })
}

/// A range of executable memory that shares no address modulo [`PERIOD`] with any other.
#[derive(Debug)]
pub struct Claim(Range<u64>);

impl Claim {
    /// Takes a range if it is free; if not, how many bytes below `start` one may begin that is.
    fn new(start: u64, len: u64) -> std::result::Result<Claim, u64> {
        let mut taken = taken();
        if let Some(over) = over(&taken, start, len) {
            return Err(over);
        }
        taken.extend(residues(start, len));
        Ok(Claim(start..start + len))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut taken = taken();
        for r in residues(self.0.start, self.0.end - self.0.start) {
            if let Some(i) = taken.iter().position(|t| *t == r) {
                taken.swap_remove(i);
            }
        }
    }
}

/// Reserves address space for executable memory, where nothing else is modulo [`PERIOD`]; `align` is a power of two from 4096 on.
///
/// # Errors
/// The host's, or that there is no such place.
pub fn reserve(len: usize, align: usize) -> Result<(*mut u8, Claim)> {
    // Until one is found the others stay, or the kernel, which does not follow a hint to what is in use, would give one of them again.
    let mut rejected = Vec::new();
    let mut hint = 0;
    for _ in 0..256 {
        let place = Reserved::near(hint, len, align)?;
        let start = place.start() as u64;
        match Claim::new(start, len as u64) {
            Ok(claim) => return Ok((place.keep(), claim)),
            // The next try is below.
            Err(over) => hint = start.saturating_sub(over) as usize / align * align,
        }
        rejected.push(place);
    }
    Err(Error::new(ErrorKind::AddrNotAvailable, "executable memory lies everywhere modulo 2 GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of /proc/self/maps (proc_pid_maps(5)).
    fn executable() -> Vec<Range<u64>> {
        let maps = std::fs::read_to_string("/proc/self/maps").expect("the mappings");
        let of = |line: &str| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let at = |s| u64::from_str_radix(s, 16).ok();
            // What other tests make executable has no name.
            let named = rest.contains('/') || rest.ends_with("[vdso]");
            (rest.starts_with("r-x") && named).then_some(at(start)?..at(end)?)
        };
        maps.lines().filter_map(of).collect()
    }

    #[test]
    fn what_the_program_executes_is_taken() {
        let all = executable();
        assert!(all.len() >= 2, "text and vDSO at least: {all:x?}");
        for r in all {
            let around = taken();
            assert!(over(&around, r.start, 4096).is_some(), "{r:x?} is not among {around:x?}");
            assert!(over(&around, r.start.wrapping_add(5 * PERIOD), 4096).is_some());
        }
        assert!(Claim::new(VSYSCALL.start - 17 * PERIOD, 4096).is_err());
    }

    #[test]
    fn places_are_disjoint_modulo_the_period_until_they_are_given_back() {
        let mut all = Vec::new();
        for _ in 0..20 {
            let (p, claim) = reserve(3 << 20, 2 << 20).expect("a place");
            assert_eq!(p as usize % (2 << 20), 0);
            all.push((p, claim));
        }
        for (i, (a, _)) in all.iter().enumerate() {
            for (b, _) in &all[..i] {
                let distance = (*a as u64).wrapping_sub(*b as u64) % PERIOD;
                assert!((3 << 20..=PERIOD - (3 << 20)).contains(&distance), "{a:?} {b:?}");
            }
        }
        let first = all[0].0 as u64;
        assert!(Claim::new(first + PERIOD, 4096).is_err());
        for (p, claim) in all {
            drop(claim);
            // SAFETY: reserved above.
            unsafe { libc::munmap(p.cast(), 3 << 20) };
        }
        assert!(Claim::new(first + PERIOD, 4096).is_ok());
    }

    #[test]
    fn a_place_is_found_below_what_is_taken_even_if_that_is_in_use() {
        let (p, all) = reserve(1 << 20, 4096).expect("a place");
        // What the kernel would give next, and much below it, is taken, and the place below that is in use.
        let much: Vec<_> = (1..=300).filter_map(|n| Claim::new(p as u64 - (n << 20), 1 << 20).ok()).collect();
        let _used = Reserved::at(p as usize - (301 << 20), 1 << 20);
        let (q, next) = reserve(1 << 20, 4096).expect("a place");
        let (r, last) = reserve(1 << 20, 4096).expect("another");
        for (p, claim) in [(p, all), (q, next), (r, last)] {
            assert!(much.iter().all(|m| !claim.0.contains(&m.0.start)));
            drop(claim);
            // SAFETY: reserved above.
            unsafe { libc::munmap(p.cast(), 1 << 20) };
        }
    }

    #[test]
    fn how_far_below_something_the_next_place_is() {
        let taken = [0x10_0000..0x20_0000, PERIOD - 0x1000..PERIOD];
        let at = |start| over(&taken, 7 * PERIOD + start, 0x4000);
        assert_eq!(at(0x10_0000 - 0x4000), None);
        assert_eq!(at(0x10_0000 - 0x3000), Some(0x1000));
        assert_eq!(at(0x1f_f000), Some(0x10_3000));
        assert_eq!(at(0x20_0000), None);
        assert_eq!(at(PERIOD - 0x2000), Some(0x3000), "over the end of the period");
        assert_eq!(at(0), None);
    }

    #[test]
    fn a_range_over_the_end_of_the_period_has_two_parts() {
        let parts: Vec<_> = residues(PERIOD * 3 - 4096, 8192).collect();
        assert_eq!(parts, [PERIOD - 4096..PERIOD, 0..4096]);
    }
}
