//! The files of /proc that would show bivisor: exe, maps, smaps, cmdline, environ and auxv of the process itself (proc(5)).
//!
//! Where the host allows it, [`tell_kernel`] makes the kernel itself show the guest's arguments, environment and auxiliary vector, to
//! everybody; the files made here are for the guest's own eyes.

use crate::linux::Process;
use crate::linux::host::{self, err, host_call};
use crate::linux::stack::{Placed, at};
use crate::mem::{Prot, Vma};
use std::ffi::OsStr;
use std::fmt::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::sync::OnceLock;

/// What a path into /proc means for the guest.
#[derive(Debug, PartialEq, Eq)]
pub enum Special {
    /// The link to the program: where it goes.
    Exe(PathBuf),
    /// A file with this content.
    Content(Vec<u8>),
}

const NAMES: [&[u8]; 6] = [b"exe", b"maps", b"smaps", b"cmdline", b"environ", b"auxv"];

/// Is the path one of those, of this process?
pub fn special(process: &Process, dir: i32, path: &[u8]) -> Option<Special> {
    let name = path.rsplit(|&c| c == b'/').next()?;
    if !NAMES.contains(&name) {
        return None;
    }
    let mut full = Vec::new();
    if !path.starts_with(b"/") {
        let base = if dir == libc::AT_FDCWD { "/proc/self/cwd".into() } else { format!("/proc/self/fd/{dir}") };
        full.extend_from_slice(std::fs::read_link(base).ok()?.as_os_str().as_bytes());
        full.push(b'/');
    }
    full.extend_from_slice(path);
    let parts: Vec<&[u8]> = full.split(|&c| c == b'/').filter(|p| !p.is_empty() && *p != b".").collect();
    let own = match parts.as_slice() {
        [b"proc", who, _] if name == b"exe" && !is_own(who) => return exe_of(who).map(Special::Exe),
        [b"proc", who, _] => is_own(who),
        [b"proc", who, b"task", tid, _] => is_own(who) && is_own(tid),
        _ => false,
    };
    if !own {
        return None;
    }
    match name {
        b"exe" => Some(Special::Exe(process.exe.clone())),
        b"maps" => Some(Special::Content(maps(process).into_bytes())),
        b"smaps" => Some(Special::Content(smaps(process).into_bytes())),
        _ if process.shown_by_kernel => None,
        b"cmdline" => Some(Special::Content(joined(&process.args))),
        b"environ" => Some(Special::Content(joined(&process.env))),
        _ => None,
    }
}

/// The program of another process, if that is run by this bivisor: the file from which its program headers are mapped.
fn exe_of(pid: &[u8]) -> Option<PathBuf> {
    let pid: u32 = std::str::from_utf8(pid).ok()?.parse().ok()?;
    let link = |who: &str| std::fs::read_link(format!("/proc/{who}/exe")).ok();
    link(&pid.to_string()).filter(|theirs| link("self").as_ref() == Some(theirs))?;
    let aux = std::fs::read(format!("/proc/{pid}/auxv")).ok()?;
    let word = |b: &[u8]| u64::from_le_bytes(b.try_into().unwrap_or_default());
    let phdr = aux.chunks_exact(16).find(|e| word(&e[..8]) == at::PHDR).map(|e| word(&e[8..]))?;
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let line = maps.lines().filter_map(parse).find(|l| (l.start..l.end).contains(&phdr))?;
    line.name.starts_with('/').then(|| PathBuf::from(line.name))
}

/// `self`, `thread-self`, or the number of one of our tasks.
fn is_own(who: &[u8]) -> bool {
    if who == b"self" || who == b"thread-self" {
        return true;
    }
    let number = std::str::from_utf8(who)
        .ok()
        .filter(|s| s.bytes().all(|c| c.is_ascii_digit()))
        .and_then(|s| s.parse::<u32>().ok());
    number.is_some_and(|n| n == std::process::id() || std::path::Path::new(&format!("/proc/self/task/{n}")).exists())
}

fn joined(all: &[std::ffi::OsString]) -> Vec<u8> {
    all.iter().flat_map(|s| s.as_bytes().iter().copied().chain([0])).collect()
}

/// One line of the host's maps file.
struct Line<'a> {
    start: u64,
    end: u64,
    offset: u64,
    /// Device and inode.
    file: &'a str,
    name: &'a str,
}

fn parse(line: &str) -> Option<Line<'_>> {
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let hex = |s: &str| u64::from_str_radix(s, 16).ok();
    let _rights = fields.next()?;
    let offset = hex(fields.next()?)?;
    let (device, inode) = (fields.next()?, fields.next()?);
    let at = device.as_ptr() as usize - line.as_ptr() as usize;
    let file = &line[at..at + device.len() + 1 + inode.len()];
    Some(Line { start: hex(start)?, end: hex(end)?, offset, file, name: fields.next().unwrap_or("").trim_start() })
}

fn rights(v: &Vma) -> [char; 4] {
    let has = |p: Prot, c: char| if v.prot.contains(p) { c } else { '-' };
    [has(Prot::READ, 'r'), has(Prot::WRITE, 'w'), has(Prot::EXEC, 'x'), if v.shared { 's' } else { 'p' }]
}

/// A line to print; neighbours that the kernel would keep as one mapping are one.
#[derive(Clone, PartialEq, Eq)]
struct Shown<'a> {
    start: u64,
    end: u64,
    rights: [char; 4],
    offset: u64,
    file: &'a str,
    name: String,
}

fn shown<'a>(process: &Process, host: &'a str) -> Vec<Shown<'a>> {
    let mut all: Vec<Shown<'a>> = Vec::new();
    for line in host.lines().filter_map(parse) {
        for v in process.space.flat().parts(line.start..line.end) {
            let name = if v.name.starts_with('[') { v.name.to_string() } else { line.name.to_string() };
            let offset = if line.file.ends_with(" 0") { 0 } else { line.offset + (v.start - line.start) };
            let new = Shown { start: v.start, end: v.end, rights: rights(&v), offset, file: line.file, name };
            if let Some(last) = all.last_mut() {
                let file_goes_on =
                    new.offset == 0 && last.offset == 0 || last.offset + (last.end - last.start) == new.offset;
                let same = last.end == new.start
                    && last.rights == new.rights
                    && last.file == new.file
                    && last.name == new.name;
                if same && file_goes_on {
                    last.end = new.end;
                    continue;
                }
            }
            all.push(new);
        }
    }
    all
}

fn print(to: &mut String, s: &Shown<'_>) {
    let rights: String = s.rights.iter().collect();
    let line = format!("{:08x}-{:08x} {} {:08x} {}", s.start, s.end, rights, s.offset, s.file);
    let _ = match s.name.is_empty() {
        true => writeln!(to, "{line} "),
        false => writeln!(to, "{line:<72} {}", s.name),
    };
}

/// /proc/self/maps: the host's list, without what is bivisor's, with the guest's rights.
fn maps(process: &Process) -> String {
    let host = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let mut text = String::new();
    for s in shown(process, &host) {
        print(&mut text, &s);
    }
    // Of the kernel's half, last.
    text.extend(host.lines().filter(|l| l.ends_with("[vsyscall]")).flat_map(|l| [l, "\n"]));
    text
}

/// /proc/self/smaps: the host's counts for each of the guest's mappings, as the host cuts them.
fn smaps(process: &Process) -> String {
    let host = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    let mut text = String::new();
    let mut own = false;
    for line in host.lines() {
        // A line of counts has a word with a colon first.
        if line.split(' ').next().is_some_and(|w| w.ends_with(':')) {
            if own {
                text.push_str(line);
                text.push('\n');
            }
            continue;
        }
        let first = shown(process, line).into_iter().next();
        own = first.is_some();
        if let Some(s) = first {
            print(&mut text, &s);
        }
    }
    text
}

/// Opens a file with this content: gives the descriptor or `-errno`.
pub fn open(content: &[u8], flags: u64) -> i64 {
    if flags & libc::O_ACCMODE as u64 != libc::O_RDONLY as u64 {
        return err(libc::EACCES);
    }
    let cloexec = if flags & libc::O_CLOEXEC as u64 != 0 { libc::MFD_CLOEXEC } else { 0 };
    let fd = host_call(libc::SYS_memfd_create as u64, [c"proc".as_ptr() as u64, u64::from(cloexec), 0, 0, 0, 0]);
    if fd < 0 {
        return fd;
    }
    let mut at = 0;
    while at < content.len() {
        let rest = &content[at..];
        let n =
            host_call(libc::SYS_pwrite64 as u64, [fd as u64, rest.as_ptr() as u64, rest.len() as u64, at as u64, 0, 0]);
        if n <= 0 {
            host_call(libc::SYS_close as u64, [fd as u64, 0, 0, 0, 0, 0]);
            return if n == 0 { err(libc::EIO) } else { n };
        }
        at += n as usize;
    }
    fd
}

/// Sets the task's name as exec does: the last part of the path, 15 bytes.
pub fn set_name(path: &OsStr) {
    let name = path.as_bytes().rsplit(|&c| c == b'/').next().unwrap_or_default();
    let mut text = [0u8; 16];
    let len = name.len().min(15);
    text[..len].copy_from_slice(&name[..len]);
    host_call(libc::SYS_prctl as u64, [libc::PR_SET_NAME as u64, text.as_ptr() as u64, 0, 0, 0, 0]);
}

const PR_SET_MM_MAP: u64 = 14;

/// Makes the host's kernel show the guest's arguments, environment and auxiliary vector in /proc/PID/{cmdline,environ,auxv}.
/// False if it does not let us (no CONFIG_CHECKPOINT_RESTORE).
pub fn tell_kernel(p: &Placed) -> bool {
    // Where bivisor's own parts are does not change, and is the same in a forked child.
    static FIELDS: OnceLock<Option<Vec<u64>>> = OnceLock::new();
    let fields = FIELDS.get_or_init(|| {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // After the name, which is in parentheses, the fields count from 3.
        let (_, rest) = stat.rsplit_once(')')?;
        Some(rest.split_whitespace().map(|f| f.parse().unwrap_or(0)).collect())
    });
    let Some(fields) = fields else { return false };
    let field = |n: usize| fields.get(n - 3).copied().unwrap_or(0);
    // struct prctl_mm_map; all that is bivisor's own stays.
    let map = [
        field(26),
        field(27),
        field(45),
        field(46),
        field(47),
        host::own_brk(),
        field(28),
        p.args.start,
        p.args.end,
        p.env.start,
        p.env.end,
        p.aux.start,
        // auxv_size, and -1 for "the executable stays".
        (p.aux.end - p.aux.start) | 0xffff_ffff << 32,
    ];
    let size = size_of_val(&map) as u64;
    let a = [libc::PR_SET_MM as u64, PR_SET_MM_MAP, map.as_ptr() as u64, size, 0, 0];
    host_call(libc::SYS_prctl as u64, a) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps() {
        let l =
            parse("7f1000000000-7f1000002000 r--p 00001000 fd:01 1234                       /usr/lib/a b.so").unwrap();
        assert_eq!((l.start, l.end, l.offset), (0x7f10_0000_0000, 0x7f10_0000_2000, 0x1000));
        assert_eq!((l.file, l.name), ("fd:01 1234", "/usr/lib/a b.so"));
        let l = parse("7f1000000000-7f1000002000 rw-p 00000000 00:00 0 ").unwrap();
        assert_eq!((l.file, l.name), ("00:00 0", ""));
    }
}
