//! execve(2), execveat(2): the program is checked as the kernel would, then bivisor goes on with it ([`in_place`]), or the host executes
//! bivisor anew with it.
//!
//! In the latter case descriptors, process id, ignored and pending signals, the blocked mask, limits and credentials pass through exec by the
//! host's own rules. The guest's variables that would act on bivisor's own start travel under other names (`hidden`, [`guest_environment`]).

use crate::host::fds;
use crate::linux::file::guest_string;
use crate::linux::host::{err, host_call, interruptible};
use crate::linux::load::Image;
use crate::linux::proc::{self, Special};
use crate::linux::signal::{self, RESTART};
use crate::linux::syscall::{Args, Outcome};
use crate::linux::{Task, in_place};
use crate::mem::GuestMemory;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const EFAULT: i64 = err(libc::EFAULT);
/// More arguments than this do not fit into any stack.
const MAX_STRINGS: usize = 1 << 22;

/// Opens bivisor's own file, so that it can be executed whatever becomes of paths and /proc. Called when a process starts.
pub fn prepare() -> Option<RawFd> {
    static OWN: OnceLock<Option<RawFd>> = OnceLock::new();
    *OWN.get_or_init(|| File::open("/proc/self/exe").ok().map(|f| fds::keep(f.into())))
}

/// What the host's execveat gets; kept in the task because after vfork(2) nobody else frees it.
#[derive(Debug, Default)]
pub struct Arguments {
    strings: Vec<CString>,
    argv: Vec<u64>,
    envp: Vec<u64>,
}

/// execve(2).
pub fn execve(task: &mut Task, [path, argv, envp, ..]: Args) -> Outcome {
    let result = named(task, libc::AT_FDCWD, path, 0).and_then(|path| exec(task, path, argv, envp));
    result.unwrap_or_else(Outcome::from)
}

/// execveat(2).
pub fn execveat(task: &mut Task, [dir, path, argv, envp, flags, _]: Args) -> Outcome {
    let result = named(task, dir as i32, path, flags as i32).and_then(|path| exec(task, path, argv, envp));
    result.unwrap_or_else(Outcome::from)
}

/// The file that is to be executed, as a path that means the same after the host's exec.
fn named(task: &Task, dir: i32, at: u64, flags: i32) -> Result<PathBuf, i64> {
    if flags & !(libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW) != 0 {
        return Err(err(libc::EINVAL));
    }
    let path = match guest_string(task, at) {
        Some(path) => path,
        None if task.process.mem().read(at, &mut [0]).is_none() => return Err(EFAULT),
        None => return Err(err(libc::ENAMETOOLONG)),
    };
    if let Some(Special::Exe(exe)) = proc::special(&task.process, dir, &path) {
        return Ok(exe);
    }
    let path = PathBuf::from(OsString::from_vec(path));
    if flags & libc::AT_SYMLINK_NOFOLLOW != 0 && path.is_symlink() {
        return Err(err(libc::ELOOP));
    }
    if path.as_os_str().is_empty() {
        if flags & libc::AT_EMPTY_PATH == 0 {
            return Err(err(libc::ENOENT));
        }
        return by_descriptor(dir);
    }
    if path.is_absolute() || dir == libc::AT_FDCWD {
        return Ok(path);
    }
    Ok(by_descriptor(dir)?.join(path))
}

/// A path for an open file. One that has none (deleted, memfd) is kept open under another number for the next bivisor.
fn by_descriptor(fd: i32) -> Result<PathBuf, i64> {
    let link = PathBuf::from(format!("/proc/self/fd/{fd}"));
    let target = std::fs::read_link(&link).map_err(|_| err(libc::EBADF))?;
    let same = |a: &Path, b: &Path| {
        use std::os::unix::fs::MetadataExt;
        let id = |p: &Path| p.metadata().map(|m| (m.dev(), m.ino()));
        matches!((id(a), id(b)), (Ok(x), Ok(y)) if x == y)
    };
    if same(&target, &link) {
        return Ok(target);
    }
    let copy = host_call(libc::SYS_fcntl as u64, [fd as u64, libc::F_DUPFD as u64, 3, 0, 0, 0]);
    if copy < 0 { Err(copy) } else { Ok(format!("/proc/self/fd/{copy}").into()) }
}

fn exec(task: &mut Task, path: PathBuf, argv: u64, envp: u64) -> Result<Outcome, i64> {
    // A file that is open for the next bivisor is not for this one.
    if !path.starts_with("/proc/self/fd") && in_place::possible(task) {
        if task.signals.inbox.any() {
            return Err(RESTART);
        }
        let strings = Strings::read(task.process.mem(), argv, envp)?;
        let open = || {
            let image = Image::open(&path, strings.args.clone()).map_err(|e| err(e.errno()))?;
            if in_place::fits(&strings, path.as_os_str().as_bytes()) {
                Ok((image, strings))
            } else {
                Err(err(libc::E2BIG))
            }
        };
        return in_place::go_on(task, open).map(|()| Outcome::Resume);
    }
    if let Err(e) = Image::open(&path, vec![OsString::new()]) {
        return Err(err(e.errno()));
    }
    let own = prepare().ok_or(err(libc::ENOENT))?;
    task.exec = arguments(task, path, argv, envp)?;
    let a = &task.exec;
    let envp = if a.envp.is_empty() { envp } else { a.envp.as_ptr() as u64 };
    let call = [own as u64, c"".as_ptr() as u64, a.argv.as_ptr() as u64, envp, libc::AT_EMPTY_PATH as u64, 0];
    if task.signals.inbox.any() {
        return Err(RESTART);
    }
    task.process.address_limit.give_to_host();
    task.process.signals.prepare_exec(task.signals.mask);
    let result = interruptible(task.signals.inbox.flag(), libc::SYS_execveat as u64, call).unwrap_or(RESTART);
    // Still here.
    task.process.signals.restore_routes();
    if !task.signals.inbox.any() {
        let mask = task.signals.mask;
        signal::set_mask(task, mask);
    }
    task.exec = Arguments::default();
    Ok(result.into())
}

/// What a program is started with.
#[derive(Debug)]
pub struct Strings {
    /// argv, at least one.
    pub args: Vec<OsString>,
    /// envp.
    pub env: Vec<OsString>,
}

impl Strings {
    fn read(mem: &GuestMemory, argv: u64, envp: u64) -> Result<Strings, i64> {
        let list = |list| -> Result<Vec<OsString>, i64> {
            pointers(mem, list)?.into_iter().map(|at| string(mem, at).map(OsString::from_vec)).collect()
        };
        let (mut args, env) = (list(argv)?, list(envp)?);
        if args.is_empty() {
            args.push(OsString::new());
        }
        Ok(Strings { args, env })
    }
}

/// `bivisor run [options] --argv0=X --exact -- PATH ARGS`.
fn arguments(task: &Task, path: PathBuf, argv: u64, envp: u64) -> Result<Arguments, i64> {
    let mem = task.process.mem();
    let mut guest = pointers(mem, argv)?.into_iter();
    let c_string = |bytes: &[u8]| CString::new(bytes).map_err(|_| err(libc::EINVAL));
    let mut a = Arguments::default();
    a.strings.push(c"bivisor".to_owned());
    for option in &task.process.options.reexec {
        a.strings.push(c_string(option.as_bytes())?);
    }
    let mut name = b"--argv0=".to_vec();
    if let Some(at) = guest.next() {
        name.extend(string(mem, at)?);
    }
    a.strings.push(c_string(&name)?);
    a.strings.extend([c"--exact".to_owned(), c"--".to_owned()]);
    a.strings.push(c_string(path.as_os_str().as_bytes())?);
    a.argv = a.strings.iter().map(|s| s.as_ptr() as u64).chain(guest).chain([0]).collect();

    let variables = pointers(mem, envp)?;
    let mut changed = false;
    a.envp.reserve_exact(variables.len() + 1);
    for at in variables {
        match hidden(&string(mem, at)?) {
            Some(other) => {
                let other = c_string(&other)?;
                a.envp.push(other.as_ptr() as u64);
                a.strings.push(other);
                changed = true;
            }
            None => a.envp.push(at),
        }
    }
    if changed {
        a.envp.push(0)
    } else {
        a.envp.clear()
    }
    Ok(a)
}

/// A list of pointers that ends with a null one; a null list is an empty one.
fn pointers(mem: &GuestMemory, list: u64) -> Result<Vec<u64>, i64> {
    let mut all = Vec::new();
    if list == 0 {
        return Ok(all);
    }
    while all.len() < MAX_STRINGS {
        let mut word = [0; 8];
        mem.read(list.wrapping_add(8 * all.len() as u64), &mut word).ok_or(EFAULT)?;
        match u64::from_le_bytes(word) {
            0 => return Ok(all),
            at => all.push(at),
        }
    }
    Err(err(libc::E2BIG))
}

/// Longest argument with its NUL (MAX_ARG_STRLEN).
const MAX_STRING: usize = 32 * 4096;

fn string(mem: &GuestMemory, at: u64) -> Result<Vec<u8>, i64> {
    let mut text = Vec::new();
    while text.len() < MAX_STRING {
        let at = at.wrapping_add(text.len() as u64);
        let mut piece = [0; 64];
        // Not across the end of a page that may be the last one.
        let len = (64 - at % 64) as usize;
        mem.read(at, &mut piece[..len]).ok_or(EFAULT)?;
        match piece[..len].iter().position(|&c| c == 0) {
            Some(end) => {
                text.extend_from_slice(&piece[..end]);
                return Ok(text);
            }
            None => text.extend_from_slice(&piece[..len]),
        }
    }
    Err(err(libc::E2BIG))
}

/// Variables that the dynamic linker, the C library or Rust's runtime would take as meant for bivisor.
const ACTING: [&[u8]; 4] = [b"LD_", b"GLIBC_TUNABLES=", b"MALLOC_", b"RUST_"];
const PREFIX: &[u8] = b"BIVISOR_GUEST_";

/// A variable (`NAME=value`) that must not act on bivisor, under another name. One that has such a name already gets another prefix.
fn hidden(variable: &[u8]) -> Option<Vec<u8>> {
    let acts = ACTING.iter().any(|p| variable.starts_with(p)) || variable.starts_with(PREFIX);
    acts.then(|| [PREFIX, variable].concat())
}

/// The guest's environment from bivisor's own: takes the names back that [`execve`] gave.
pub fn guest_environment(own: impl Iterator<Item = OsString>) -> Vec<OsString> {
    own.map(|v| match v.as_bytes().strip_prefix(PREFIX) {
        Some(rest) => OsStr::from_bytes(rest).to_owned(),
        None => v,
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_act_on_us_travel_hidden() {
        for v in ["LD_PRELOAD=x", "RUST_BACKTRACE=1", "BIVISOR_GUEST_A=b", "BIVISOR_GUEST_LD_X=c"] {
            let other = hidden(v.as_bytes()).unwrap();
            assert!(!ACTING.iter().any(|p| other.starts_with(p)));
            assert_eq!(guest_environment([OsString::from_vec(other)].into_iter()), [OsString::from(v)]);
        }
        assert_eq!(hidden(b"PATH=/bin"), None);
        assert_eq!(hidden(b"OLD_LD_X=1"), None);
    }
}
