//! The host's time-stamp counter and random numbers.
#![allow(unsafe_code)]

/// The host's time-stamp counter.
#[inline]
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 has RDTSC, and user code may execute it unless prctl(PR_SET_TSC) forbade it, which nobody here does.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// A random number from the host's kernel; `None` if it has none yet.
pub fn random() -> Option<u64> {
    let mut v = [0u8; 8];
    // SAFETY: the buffer is ours and eight bytes long.
    let n = unsafe { libc::getrandom(v.as_mut_ptr().cast(), v.len(), libc::GRND_NONBLOCK) };
    (n == 8).then(|| u64::from_le_bytes(v))
}
