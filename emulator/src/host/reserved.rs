//! Address space that is taken before anything lies there.
#![allow(unsafe_code)]

use std::io::{Error, ErrorKind, Result};

/// Addresses that nothing can be reached at, and that nobody else gets; given back in the end, with whatever was mapped there, unless
/// they are kept.
#[derive(Debug)]
pub struct Reserved {
    start: usize,
    len: usize,
}

impl Reserved {
    /// So many bytes wherever the kernel puts them; `align` is a power of two from 4096 on.
    ///
    /// # Errors
    /// The host's.
    pub fn anywhere(len: usize, align: usize) -> Result<Reserved> {
        Reserved::near(0, len, align)
    }

    /// At `hint` if that is free, else anywhere.
    ///
    /// # Errors
    /// The host's.
    pub fn near(hint: usize, len: usize, align: usize) -> Result<Reserved> {
        let more = align - 4096;
        let p = map(hint, len + more, 0)?;
        let start = p.next_multiple_of(align);
        let (before, after) = (start - p, more - (start - p));
        // SAFETY: the ends of the fresh mapping.
        unsafe {
            if before > 0 {
                libc::munmap(p as *mut _, before);
            }
            if after > 0 {
                libc::munmap((start + len) as *mut _, after);
            }
        }
        Ok(Reserved { start, len })
    }

    /// Exactly there.
    ///
    /// # Errors
    /// The host's, or that something is there.
    pub fn at(start: usize, len: usize) -> Result<Reserved> {
        let taken = Reserved { start: map(start, len, libc::MAP_FIXED_NOREPLACE)?, len };
        // A kernel before 4.17 takes the flag for nothing.
        if taken.start == start { Ok(taken) } else { Err(ErrorKind::AlreadyExists.into()) }
    }

    /// Where they begin.
    pub fn start(&self) -> usize {
        self.start
    }

    /// Leaves them to the caller.
    pub fn keep(self) -> *mut u8 {
        let start = self.start;
        std::mem::forget(self);
        start as *mut u8
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        // SAFETY: what was taken as ours, and who mapped something there no longer uses it.
        unsafe { libc::munmap(self.start as *mut _, self.len) };
    }
}

fn map(at: usize, len: usize, fixed: i32) -> Result<usize> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | fixed;
    // SAFETY: a fresh mapping without rights, which replaces none.
    let p = unsafe { libc::mmap(at as *mut _, len, libc::PROT_NONE, flags, -1, 0) };
    if p == libc::MAP_FAILED { Err(Error::last_os_error()) } else { Ok(p as usize) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_aligned_and_nobody_elses_until_it_is_given_back() {
        let a = Reserved::anywhere(3 << 20, 2 << 20).expect("address space");
        assert_eq!(a.start() % (2 << 20), 0);
        let (first, last) = (a.start(), a.start() + (3 << 20) - 4096);
        for at in [first, last] {
            assert!(Reserved::at(at, 4096).is_err(), "{at:x}");
            let elsewhere = Reserved::near(at, 4096, 4096).expect("address space");
            assert!(!(first..=last).contains(&elsewhere.start()));
        }
        drop(a);
        // Another test's thread may take it meanwhile, but hardly both and every time.
        let again = (0..100).any(|_| Reserved::at(first, 4096).is_ok() || Reserved::at(last, 4096).is_ok());
        assert!(again, "given back");
    }
}
