//! The way into the host's kernel: one function for every passed-through call, and the few calls the personality makes for itself.
#![allow(unsafe_code)]

use crate::host::syscall::Aborted;
use std::ffi::{CStr, CString, OsString, c_long};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::sync::atomic::AtomicU32;

/// Errors as the kernel returns them: `-errno` in the result register.
pub const fn err(errno: i32) -> i64 {
    -(errno as i64)
}

/// Does a system call with the guest's arguments; gives what the kernel leaves in RAX (`-errno` on failure).
///
/// The arguments may name any guest memory. What must not be given to the kernel (changes of mappings that are not the guest's, file
/// descriptors of ours) is refused before, see [`crate::linux::table`].
pub fn host_call(number: u64, a: [u64; 6]) -> i64 {
    // SAFETY: the table lets only calls through that act on the guest's own resources.
    let r = unsafe { libc::syscall(number as c_long, a[0], a[1], a[2], a[3], a[4], a[5]) };
    if r == -1 { err(std::io::Error::last_os_error().raw_os_error().unwrap_or(libc::ENOSYS)) } else { r }
}

/// As [`host_call`], for calls that may block: not executed if `flag` is set, which a signal does.
///
/// # Errors
/// [`Aborted`]: not executed, see [`crate::host::syscall`].
#[inline]
pub fn interruptible(flag: &AtomicU32, number: u64, a: [u64; 6]) -> Result<i64, Aborted> {
    // SAFETY: as for `host_call`.
    unsafe { crate::host::syscall::interruptible(flag, number, a) }
}

/// The calling thread's id.
pub fn gettid() -> i32 {
    host_call(libc::SYS_gettid as u64, [0; 6]) as i32
}

pub use crate::host::fork::exit_group;

/// Ends the process by a signal's default action, without a core dump of the virtual machine.
pub fn die_of(sig: i32) -> ! {
    // SAFETY: plain call on a live structure.
    unsafe {
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &none);
    }
    crate::host::signal::default_action(sig);
    // The default action was not to die.
    exit_group(128 + sig)
}

/// An entry of bivisor's own auxiliary vector, 0 if it is not there.
pub fn aux(kind: u64) -> u64 {
    // SAFETY: reads a table of the C library.
    unsafe { libc::getauxval(kind) }
}

/// Random bytes of the host, for AT_RANDOM and addresses; not for keys.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // SAFETY: writes at most N bytes.
    unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, libc::GRND_NONBLOCK) };
    bytes
}

/// Does the host randomize addresses for this process?
pub fn randomizes() -> bool {
    // SAFETY: 0xffffffff asks and changes nothing.
    unsafe { libc::personality(0xffff_ffff) & libc::ADDR_NO_RANDOMIZE == 0 }
}

/// The soft limit of the stack in bytes.
pub fn stack_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 8 << 20, rlim_max: 0 };
    // SAFETY: fills the structure.
    unsafe { libc::getrlimit(libc::RLIMIT_STACK, &mut limit) };
    limit.rlim_cur
}

/// May the effective user execute the file?
pub fn may_execute(path: &Path) -> bool {
    // SAFETY: the string lives through the call.
    CString::new(path.as_os_str().as_bytes())
        .is_ok_and(|p| unsafe { libc::faccessat(libc::AT_FDCWD, p.as_ptr(), libc::X_OK, libc::AT_EACCESS) == 0 })
}

/// The end of bivisor's own heap.
pub fn own_brk() -> u64 {
    // SAFETY: asks and changes nothing.
    unsafe { libc::sbrk(0) as u64 }
}

/// The environment as it is, with strings that are no variables; nobody in this program changes it.
pub fn environment() -> Vec<OsString> {
    let mut all = Vec::new();
    // SAFETY: the C library's list of strings ends with a null pointer.
    unsafe {
        let mut at = libc::environ;
        while !at.is_null() && !(*at).is_null() {
            all.push(OsString::from_vec(CStr::from_ptr(*at).to_bytes().to_vec()));
            at = at.add(1);
        }
    }
    all
}
