//! System calls that name files: paths into /proc that would show bivisor instead of the guest, and descriptors that are bivisor's.

use crate::host::fds;
use crate::linux::Task;
use crate::linux::host::{err, host_call};
use crate::linux::proc::{self, Special};
use crate::linux::syscall::{Args, Outcome, number, pass};
use std::ffi::CString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

const AT_FDCWD: u64 = libc::AT_FDCWD as u64;
const EBADF: i64 = err(libc::EBADF);

/// Longest path with its NUL (PATH_MAX).
const PATH_MAX: usize = 4096;

/// A string of the guest without its NUL; `None` if it is not readable or too long.
pub fn guest_string(task: &Task, addr: u64) -> Option<Vec<u8>> {
    let mut text = Vec::new();
    while text.len() < PATH_MAX {
        let at = addr.checked_add(text.len() as u64)?;
        // Not across the end of a page that may be the last one.
        let mut piece = [0; 64];
        let len = (64 - at % 64) as usize;
        task.process.mem().read(at, &mut piece[..len])?;
        match piece[..len].iter().position(|&c| c == 0) {
            Some(end) => {
                text.extend_from_slice(&piece[..end]);
                return Some(text);
            }
            None => text.extend_from_slice(&piece[..len]),
        }
    }
    None
}

fn special(task: &Task, dir: u64, path: u64) -> Option<Special> {
    let path = guest_string(task, path)?;
    proc::special(&task.process, dir as i32, &path)
}

/// A call whose argument `n` is a path, relative to `dir`.
fn with_path(task: &mut Task, dir: u64, n: usize, mut a: Args) -> Outcome {
    let exe = match special(task, dir, a[n]) {
        Some(Special::Exe(exe)) => CString::new(exe.into_os_string().into_vec()).ok(),
        _ => None,
    };
    if let Some(exe) = &exe {
        a[n] = exe.as_ptr() as u64;
    }
    let number = number(task);
    pass(task, number, a).into()
}

/// stat(2), access(2).
pub fn path_first(task: &mut Task, a: Args) -> Outcome {
    with_path(task, AT_FDCWD, 0, a)
}

/// newfstatat, statx, faccessat: the link /proc/self/exe itself stays what it is.
pub fn path_second(task: &mut Task, a: Args) -> Outcome {
    let number = number(task);
    let flags = match number as i64 {
        libc::SYS_newfstatat | libc::SYS_faccessat2 => a[3],
        libc::SYS_statx => a[2],
        _ => 0,
    };
    if flags & libc::AT_SYMLINK_NOFOLLOW as u64 != 0 {
        return pass(task, number, a).into();
    }
    with_path(task, a[0], 1, a)
}

fn open_at(task: &mut Task, dir: u64, n: usize, flags: u64, mut a: Args) -> Outcome {
    let number = number(task);
    let found = if flags & libc::O_NOFOLLOW as u64 != 0 { None } else { special(task, dir, a[n]) };
    match found {
        Some(Special::Content(content)) => proc::open(&content, flags).into(),
        Some(Special::Exe(exe)) => {
            let Ok(exe) = CString::new(exe.into_os_string().into_vec()) else {
                return err(libc::ENOENT).into();
            };
            a[n] = exe.as_ptr() as u64;
            pass(task, number, a).into()
        }
        None => pass(task, number, a).into(),
    }
}

/// open(2).
pub fn open(task: &mut Task, a: Args) -> Outcome {
    open_at(task, AT_FDCWD, 0, a[1], a)
}

/// openat(2).
pub fn openat(task: &mut Task, a: Args) -> Outcome {
    open_at(task, a[0], 1, a[2], a)
}

/// openat2(2).
pub fn openat2(task: &mut Task, a: Args) -> Outcome {
    let mut flags = [0; 8];
    if task.process.mem().read(a[2], &mut flags).is_none() {
        return err(libc::EFAULT).into();
    }
    open_at(task, a[0], 1, u64::from_le_bytes(flags), a)
}

fn read_link(task: &mut Task, dir: u64, n: usize, a: Args) -> Outcome {
    let number = number(task);
    let Some(Special::Exe(exe)) = special(task, dir, a[n]) else { return pass(task, number, a).into() };
    let size = a[n + 2] as i32;
    if size <= 0 {
        return err(libc::EINVAL).into();
    }
    let exe = exe.as_os_str().as_bytes();
    let text = &exe[..exe.len().min(size as usize)];
    match task.process.mem().write(a[n + 1], text) {
        Some(()) => (text.len() as i64).into(),
        None => err(libc::EFAULT).into(),
    }
}

/// readlink(2).
pub fn readlink(task: &mut Task, a: Args) -> Outcome {
    read_link(task, AT_FDCWD, 0, a)
}

/// readlinkat(2).
pub fn readlinkat(task: &mut Task, a: Args) -> Outcome {
    read_link(task, a[0], 1, a)
}

/// A call on one descriptor that must not be ours.
pub fn on_fd(task: &mut Task, a: Args) -> Outcome {
    if fds::is_own(a[0] as i32) {
        return EBADF.into();
    }
    let number = number(task);
    pass(task, number, a).into()
}

/// close(2).
pub fn close(task: &mut Task, a: Args) -> Outcome {
    on_fd(task, a)
}

/// dup2(2), dup3(2).
pub fn dup_onto(task: &mut Task, a: Args) -> Outcome {
    if fds::is_own(a[1] as i32) {
        return EBADF.into();
    }
    on_fd(task, a)
}

/// close_range(2): round our own.
pub fn close_range(_task: &mut Task, [first, last, flags, ..]: Args) -> Outcome {
    let (first, last) = (first as u32, last as u32);
    let call =
        |from: u32, to: u32| host_call(libc::SYS_close_range as u64, [u64::from(from), u64::from(to), flags, 0, 0, 0]);
    if first > last || flags as u32 & libc::CLOSE_RANGE_CLOEXEC != 0 {
        // Ours are close-on-exec anyhow.
        return call(first, last).into();
    }
    let mut from = first;
    for fd in fds::all().into_iter().map(|fd| fd as u32).filter(|fd| (first..=last).contains(fd)) {
        if fd > from {
            let r = call(from, fd - 1);
            if r < 0 {
                return r.into();
            }
        }
        from = fd + 1;
    }
    if from <= last { call(from, last).into() } else { 0.into() }
}
