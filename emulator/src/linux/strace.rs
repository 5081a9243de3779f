//! `--strace`: a line for each system call, in the manner of strace(1).

use crate::linux::file::guest_string;
use crate::linux::host::host_call;
use crate::linux::syscall::Args;
use crate::linux::table::Row;
use crate::linux::{Process, Task, signal};
use std::fmt::Write;

/// Bytes shown of a string or buffer, as strace's default.
const SHOWN: usize = 32;

const OPEN_FLAGS: &[(u64, &str)] = &[
    (libc::O_CREAT as u64, "O_CREAT"),
    (libc::O_EXCL as u64, "O_EXCL"),
    (libc::O_NOCTTY as u64, "O_NOCTTY"),
    (libc::O_TRUNC as u64, "O_TRUNC"),
    (libc::O_APPEND as u64, "O_APPEND"),
    (libc::O_NONBLOCK as u64, "O_NONBLOCK"),
    (libc::O_DIRECTORY as u64, "O_DIRECTORY"),
    (libc::O_NOFOLLOW as u64, "O_NOFOLLOW"),
    (libc::O_CLOEXEC as u64, "O_CLOEXEC"),
    (libc::O_PATH as u64, "O_PATH"),
];
const PROT: &[(u64, &str)] = &[(1, "PROT_READ"), (2, "PROT_WRITE"), (4, "PROT_EXEC")];
const MAP_FLAGS: &[(u64, &str)] = &[
    (libc::MAP_SHARED as u64, "MAP_SHARED"),
    (libc::MAP_PRIVATE as u64, "MAP_PRIVATE"),
    (libc::MAP_FIXED as u64, "MAP_FIXED"),
    (libc::MAP_ANONYMOUS as u64, "MAP_ANONYMOUS"),
    (libc::MAP_DENYWRITE as u64, "MAP_DENYWRITE"),
    (libc::MAP_NORESERVE as u64, "MAP_NORESERVE"),
    (libc::MAP_STACK as u64, "MAP_STACK"),
    (libc::MAP_FIXED_NOREPLACE as u64, "MAP_FIXED_NOREPLACE"),
];
#[rustfmt::skip]
const SIGNALS: [&str; 32] = [
    "0", "SIGHUP", "SIGINT", "SIGQUIT", "SIGILL", "SIGTRAP", "SIGABRT", "SIGBUS", "SIGFPE", "SIGKILL", "SIGUSR1", "SIGSEGV", "SIGUSR2",
    "SIGPIPE", "SIGALRM", "SIGTERM", "SIGSTKFLT", "SIGCHLD", "SIGCONT", "SIGSTOP", "SIGTSTP", "SIGTTIN", "SIGTTOU", "SIGURG", "SIGXCPU",
    "SIGXFSZ", "SIGVTALRM", "SIGPROF", "SIGWINCH", "SIGIO", "SIGPWR", "SIGSYS",
];
/// Names of errors by number (errno(3)); the two holes are numbers the kernel does not use.
#[rustfmt::skip]
const ERRORS: [&str; 134] = [
    "0", "EPERM", "ENOENT", "ESRCH", "EINTR", "EIO", "ENXIO", "E2BIG", "ENOEXEC", "EBADF", "ECHILD", "EAGAIN", "ENOMEM", "EACCES",
    "EFAULT", "ENOTBLK", "EBUSY", "EEXIST", "EXDEV", "ENODEV", "ENOTDIR", "EISDIR", "EINVAL", "ENFILE", "EMFILE", "ENOTTY", "ETXTBSY",
    "EFBIG", "ENOSPC", "ESPIPE", "EROFS", "EMLINK", "EPIPE", "EDOM", "ERANGE", "EDEADLK", "ENAMETOOLONG", "ENOLCK", "ENOSYS",
    "ENOTEMPTY", "ELOOP", "41", "ENOMSG", "EIDRM", "ECHRNG", "EL2NSYNC", "EL3HLT", "EL3RST", "ELNRNG", "EUNATCH", "ENOCSI", "EL2HLT",
    "EBADE", "EBADR", "EXFULL", "ENOANO", "EBADRQC", "EBADSLT", "58", "EBFONT", "ENOSTR", "ENODATA", "ETIME", "ENOSR", "ENONET",
    "ENOPKG", "EREMOTE", "ENOLINK", "EADV", "ESRMNT", "ECOMM", "EPROTO", "EMULTIHOP", "EDOTDOT", "EBADMSG", "EOVERFLOW", "ENOTUNIQ",
    "EBADFD", "EREMCHG", "ELIBACC", "ELIBBAD", "ELIBSCN", "ELIBMAX", "ELIBEXEC", "EILSEQ", "ERESTART", "ESTRPIPE", "EUSERS", "ENOTSOCK",
    "EDESTADDRREQ", "EMSGSIZE", "EPROTOTYPE", "ENOPROTOOPT", "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "EOPNOTSUPP", "EPFNOSUPPORT",
    "EAFNOSUPPORT", "EADDRINUSE", "EADDRNOTAVAIL", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ECONNABORTED", "ECONNRESET", "ENOBUFS",
    "EISCONN", "ENOTCONN", "ESHUTDOWN", "ETOOMANYREFS", "ETIMEDOUT", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH", "EALREADY",
    "EINPROGRESS", "ESTALE", "EUCLEAN", "ENOTNAM", "ENAVAIL", "EISNAM", "EREMOTEIO", "EDQUOT", "ENOMEDIUM", "EMEDIUMTYPE", "ECANCELED",
    "ENOKEY", "EKEYEXPIRED", "EKEYREVOKED", "EKEYREJECTED", "EOWNERDEAD", "ENOTRECOVERABLE", "ERFKILL", "EHWPOISON",
];

/// The name of a signal, SIGRTMIN+n by number.
pub fn signal_name(sig: i32) -> String {
    match SIGNALS.get(sig as usize) {
        Some(name) => (*name).into(),
        None => format!("SIG{sig}"),
    }
}

fn flags(v: u64, names: &[(u64, &str)]) -> String {
    let mut rest = v;
    let mut parts = Vec::new();
    for (bits, name) in names {
        if v & bits == *bits {
            parts.push((*name).to_string());
            rest &= !bits;
        }
    }
    if rest != 0 || parts.is_empty() {
        parts.push(format!("{rest:#x}"));
    }
    parts.join("|")
}

fn open_flags(v: u64) -> String {
    let access = ["O_RDONLY", "O_WRONLY", "O_RDWR", "O_ACCMODE"][v as usize & 3];
    match v & !3 {
        0 => access.into(),
        rest => format!("{access}|{}", flags(rest, OPEN_FLAGS)),
    }
}

fn quoted(bytes: &[u8]) -> String {
    let mut text = String::from("\"");
    for &c in bytes.iter().take(SHOWN) {
        match c {
            b'\n' => text.push_str("\\n"),
            b'\t' => text.push_str("\\t"),
            b'\r' => text.push_str("\\r"),
            b'"' | b'\\' => text.extend(['\\', c as char]),
            0x20..=0x7e => text.push(c as char),
            _ => {
                let _ = write!(text, "\\{c:o}");
            }
        }
    }
    text.push('"');
    if bytes.len() > SHOWN {
        text.push_str("...");
    }
    text
}

fn buffer(process: &Process, addr: u64, len: u64) -> String {
    let mut bytes = vec![0; len.min(SHOWN as u64 + 1) as usize];
    match process.mem().read(addr, &mut bytes) {
        Some(()) => quoted(&bytes),
        None => format!("{addr:#x}"),
    }
}

fn string(task: &Task, addr: u64) -> String {
    match guest_string(task, addr) {
        Some(s) if s.len() > SHOWN => format!("\"{}\"", String::from_utf8_lossy(&s).escape_debug()),
        Some(s) => quoted(&s),
        None => pointer(addr),
    }
}

fn pointer(addr: u64) -> String {
    if addr == 0 { "NULL".into() } else { format!("{addr:#x}") }
}

fn vector(task: &Task, addr: u64) -> String {
    let mut parts = Vec::new();
    for i in 0..8u64 {
        let mut word = [0; 8];
        match task.process.mem().read(addr.wrapping_add(8 * i), &mut word) {
            Some(()) if word != [0; 8] => parts.push(string(task, u64::from_le_bytes(word))),
            Some(()) => return format!("[{}]", parts.join(", ")),
            None => return pointer(addr),
        }
    }
    format!("[{}, ...]", parts.join(", "))
}

/// The call as text. `result` is there when it has returned: what it filled in can be shown then.
pub fn call(task: &Task, row: &Row, args: &Args, result: Option<i64>) -> String {
    let mut parts = Vec::new();
    for (i, kind) in row.args.split_whitespace().enumerate() {
        let v = args[i];
        parts.push(match kind {
            "dir" if v as i32 == libc::AT_FDCWD => "AT_FDCWD".into(),
            "fd" | "dir" | "int" => (v as i32).to_string(),
            "uint" => v.to_string(),
            "path" | "str" => string(task, v),
            "buf" => buffer(&task.process, v, args.get(i + 1).copied().unwrap_or(0)),
            "out" => match result {
                Some(n) if n >= 0 => buffer(&task.process, v, n as u64),
                _ => pointer(v),
            },
            "oflags" => open_flags(v),
            "mode" => format!("{v:#o}"),
            "prot" if v == 0 => "PROT_NONE".into(),
            "prot" => flags(v, PROT),
            "mflags" => flags(v, MAP_FLAGS),
            "sig" => signal_name(v as i32),
            "argv" => vector(task, v),
            _ => pointer(v),
        });
    }
    // What open was not asked to create has no mode.
    if row.args.ends_with("oflags mode") && args[parts.len() - 2] & libc::O_CREAT as u64 == 0 {
        parts.pop();
    }
    format!("{}({})", row.name, parts.join(", "))
}

/// A call that has returned. Addresses are hexadecimal, errors have their name and meaning.
pub fn returned(task: &Task, row: &Row, args: &Args, result: i64) {
    let text = call(task, row, args, Some(result));
    let outcome = match result {
        signal::RESTART => "? (a signal comes first, then once more)".into(),
        -4095..=-1 => {
            let name = ERRORS.get(-result as usize).map_or_else(|| (-result).to_string(), |n| (*n).to_string());
            let meaning = std::io::Error::from_raw_os_error(-result as i32).to_string();
            format!("-1 {name} ({})", meaning.split(" (os error").next().unwrap_or_default())
        }
        0..0x1_0000_0000 if row.name != "brk" => result.to_string(),
        _ => format!("{result:#x}"),
    };
    line(task, &format!("{text} = {outcome}"));
}

/// A call that will not return.
pub fn ending(task: &Task, row: &Row, args: &Args) {
    line(task, &format!("{} = ?", call(task, row, args, None)));
}

/// One line to bivisor's own copy of standard error.
pub fn line(task: &Task, text: &str) {
    let prefix = if task.tid == task.process.first { String::new() } else { format!("[pid {}] ", task.tid) };
    say(&task.process, &format!("{prefix}{text}"));
}

/// A line to bivisor's own copy of standard error, in one piece.
pub fn say(process: &Process, text: &str) {
    let text = format!("{text}\n");
    let fd = process.options.log.unwrap_or(libc::STDERR_FILENO);
    host_call(libc::SYS_write as u64, [fd as u64, text.as_ptr() as u64, text.len() as u64, 0, 0, 0]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_strings() {
        assert_eq!(open_flags((libc::O_WRONLY | libc::O_CREAT | libc::O_CLOEXEC) as u64), "O_WRONLY|O_CREAT|O_CLOEXEC");
        assert_eq!(open_flags(0), "O_RDONLY");
        assert_eq!(flags(0x22, MAP_FLAGS), "MAP_PRIVATE|MAP_ANONYMOUS");
        assert_eq!(flags(0x8000_0002, MAP_FLAGS), "MAP_PRIVATE|0x80000000");
        assert_eq!(quoted(b"a\"b\n\x01"), "\"a\\\"b\\n\\1\"");
        assert_eq!(quoted(&[b'x'; 33]), format!("\"{}\"...", "x".repeat(32)));
        assert_eq!(ERRORS[libc::EHWPOISON as usize], "EHWPOISON");
        assert_eq!(ERRORS[libc::ENOTSOCK as usize], "ENOTSOCK");
        assert_eq!(signal_name(libc::SIGSYS), "SIGSYS");
    }
}
