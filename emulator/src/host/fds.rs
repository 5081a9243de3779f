//! File descriptors that bivisor keeps open for itself while a guest runs: high numbers, closed on exec, and known by list, so that the
//! guest neither trips over them nor closes them.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::Mutex;

static OWN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

/// Programs rarely reach this number, and it is below the usual soft limit of 1024.
const LOWEST: RawFd = 960;

fn lowest() -> RawFd {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: fills the structure.
    unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) };
    LOWEST.min((limit.rlim_cur as RawFd).saturating_sub(16).max(3))
}

/// Moves a descriptor out of the guest's way and puts it on the list. It stays open until the process ends or executes.
pub fn keep(fd: OwnedFd) -> RawFd {
    let low = fd.as_raw_fd();
    // SAFETY: plain call on a descriptor we own.
    let high = unsafe { libc::fcntl(low, libc::F_DUPFD_CLOEXEC, lowest()) };
    // SAFETY: the duplicate is ours; where the limit forbids it, the original stays.
    let kept = if high >= 0 { unsafe { OwnedFd::from_raw_fd(high) } } else { fd }.into_raw_fd();
    OWN.lock().expect("no panic under the lock").push(kept);
    kept
}

/// Closes a descriptor that [`keep`] gave.
pub fn release(fd: RawFd) {
    OWN.lock().expect("no panic under the lock").retain(|&f| f != fd);
    // SAFETY: `keep` gave it and nobody else closes it.
    drop(unsafe { OwnedFd::from_raw_fd(fd) });
}

/// Takes a descriptor that [`keep`] gave off the list: from now on it belongs to somebody who will close it.
pub fn forget(fd: RawFd) {
    OWN.lock().expect("no panic under the lock").retain(|&f| f != fd);
}

/// Is it one of ours?
pub fn is_own(fd: RawFd) -> bool {
    OWN.lock().expect("no panic under the lock").contains(&fd)
}

/// All of ours in ascending order.
pub fn all() -> Vec<RawFd> {
    let mut all = OWN.lock().expect("no panic under the lock").clone();
    all.sort_unstable();
    all
}

/// Keeps other threads out, so that a fork does not copy a taken lock.
pub fn lock_for_fork() -> impl Drop {
    OWN.lock().expect("no panic under the lock")
}
