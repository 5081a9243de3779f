//! From a path to a program ready to run: permission, `#!` scripts, the ELF file and its interpreter, stack and registers (execve(2)).

use crate::cpu::cpuid::CpuModel;
use crate::cpu::{CpuState, Table};
use crate::isa::Gpr;
use crate::linux::elf::Elf;
use crate::linux::mm::Mapping;
use crate::linux::stack::{self, Placed, Stack};
use crate::linux::{AddressSpace, host};
use crate::mem::PAGE_SIZE;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A program that cannot be started: which file and why.
#[derive(Debug)]
pub struct LoadError {
    path: PathBuf,
    why: Why,
}

/// What is wrong with it.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Why {
    NotFound,
    /// The file is named by another one: as `#!` line or as PT_INTERP.
    InterpreterNotFound(PathBuf),
    Denied(&'static str),
    Directory,
    NotRegular,
    /// No ELF file, no script.
    UnknownFormat,
    BadElf(String),
    WrongMachine(String),
    TooManyScripts,
    AddressTaken {
        start: u64,
        end: u64,
        errno: i32,
    },
    NoMemory {
        bytes: u64,
        errno: i32,
    },
    NoEngine(String),
    Io(io::Error),
}

impl LoadError {
    /// What happened to which file.
    pub fn new(path: &Path, why: Why) -> LoadError {
        LoadError { path: path.to_owned(), why }
    }

    /// From an error of the host.
    pub fn io(path: &Path, e: &io::Error) -> LoadError {
        let why = match e.raw_os_error() {
            Some(libc::ENOENT) => Why::NotFound,
            Some(libc::EACCES | libc::EPERM) => {
                Why::Denied("permission denied: a directory on the way or the file is closed to you")
            }
            Some(code) => Why::Io(io::Error::from_raw_os_error(code)),
            None => Why::Io(io::Error::from(e.kind())),
        };
        LoadError::new(path, why)
    }

    /// What execve(2) returns in this case.
    pub fn errno(&self) -> i32 {
        match &self.why {
            Why::NotFound | Why::InterpreterNotFound(_) => libc::ENOENT,
            Why::Denied(_) | Why::Directory | Why::NotRegular => libc::EACCES,
            Why::UnknownFormat | Why::BadElf(_) | Why::WrongMachine(_) => libc::ENOEXEC,
            Why::TooManyScripts => libc::ELOOP,
            Why::AddressTaken { .. } | Why::NoMemory { .. } => libc::ENOMEM,
            Why::NoEngine(_) => libc::EIO,
            Why::Io(e) => e.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.path.display())?;
        match &self.why {
            Why::NotFound => write!(f, "No such file: check the path"),
            Why::InterpreterNotFound(i) => write!(f, "its interpreter {} is missing: install it", i.display()),
            Why::Denied(what) => f.write_str(what),
            Why::Directory => write!(f, "is a directory: name the program in it"),
            Why::NotRegular => write!(f, "is no regular file: name a program"),
            Why::UnknownFormat => {
                write!(f, "neither an ELF program nor a script with a #! line: give it to its interpreter by name")
            }
            Why::BadElf(what) => write!(f, "cannot be run: {what}"),
            Why::WrongMachine(what) => write!(f, "is a program for {what}: only x86-64 programs can be run"),
            Why::TooManyScripts => {
                write!(f, "its #! line names a script, and so on more than five times: name a real program")
            }
            Why::AddressTaken { start, end, errno } => write!(
                f,
                "its fixed addresses {start:#x}-{end:#x} are not free ({}): link it as position-independent (-pie)",
                io::Error::from_raw_os_error(*errno)
            ),
            Why::NoMemory { bytes, errno } => {
                write!(f, "cannot map {bytes} bytes ({}): check ulimit -v", io::Error::from_raw_os_error(*errno))
            }
            Why::NoEngine(what) => f.write_str(what),
            Why::Io(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for LoadError {}

/// A program checked for execution: scripts resolved, headers read, nothing mapped yet.
#[derive(Debug)]
pub struct Image {
    /// The name it was started by, for AT_EXECFN and the task's name.
    pub name: PathBuf,
    /// The ELF file that runs: for a script its interpreter.
    pub exe: PathBuf,
    /// The arguments, with what `#!` lines put before them.
    pub args: Vec<OsString>,
    file: File,
    elf: Elf,
    interpreter: Option<(PathBuf, File, Elf)>,
}

/// Length of the part of a file that the kernel looks at (BINPRM_BUF_SIZE).
const HEAD: usize = 256;

impl Image {
    /// Opens and checks a program as execve(2) does. `args[0]` is the name the program sees.
    ///
    /// # Errors
    /// Why it cannot be run.
    pub fn open(path: &Path, args: Vec<OsString>) -> Result<Image, LoadError> {
        let mut exe = path.to_owned();
        let mut args = args;
        for depth in 0.. {
            let opened = open_executable(&exe);
            let file = match opened {
                Err(e) if depth > 0 && e.errno() == libc::ENOENT => {
                    return Err(LoadError::new(path, Why::InterpreterNotFound(exe)));
                }
                other => other?,
            };
            let mut head = [0; HEAD];
            let len = read_head(&file, &mut head).map_err(|e| LoadError::io(&exe, &e))?;
            if head.starts_with(b"\x7fELF") {
                return Image::from_elf(path, exe, args, file);
            }
            let Some((interpreter, argument)) = parse_script(&head[..len]) else {
                return Err(LoadError::new(&exe, Why::UnknownFormat));
            };
            if depth == 5 {
                return Err(LoadError::new(path, Why::TooManyScripts));
            }
            // The script's own name takes the place of argument 0.
            let mut new: Vec<OsString> = vec![interpreter.into()];
            new.extend(argument.map(OsString::from));
            new.push(exe.into());
            new.extend(args.into_iter().skip(1));
            args = new;
            exe = PathBuf::from(interpreter);
        }
        unreachable!("the loop returns at depth 5")
    }

    fn from_elf(name: &Path, exe: PathBuf, args: Vec<OsString>, file: File) -> Result<Image, LoadError> {
        let elf = Elf::parse(&exe, &file)?;
        let interpreter = match &elf.interpreter {
            None => None,
            Some(path) => {
                let file = open_executable(path).map_err(|e| match e.errno() {
                    libc::ENOENT => LoadError::new(&exe, Why::InterpreterNotFound(path.clone())),
                    _ => e,
                })?;
                let elf = Elf::parse(path, &file)?;
                Some((path.clone(), file, elf))
            }
        };
        Ok(Image { name: name.to_owned(), exe, args, file, elf, interpreter })
    }

    /// Where the program is, as /proc/self/exe shows it: absolute, without links.
    pub fn real_path(&self) -> PathBuf {
        std::fs::read_link(format!("/proc/self/fd/{}", self.file.as_raw_fd())).unwrap_or_else(|_| self.exe.clone())
    }

    /// Maps the program, makes its stack and heap, and gives the registers it starts with and where the parts of
    /// the stack are.
    ///
    /// # Errors
    /// The host cannot map it.
    pub fn load(
        &self,
        space: &AddressSpace,
        env: &[OsString],
        cpu: &CpuModel,
    ) -> Result<(CpuState, Placed), LoadError> {
        let random: [u8; 24] = host::random_bytes();
        let program = self.elf.load(&self.exe, &self.file, space, Some(pie_base(&random[16..])))?;
        let interpreter = match &self.interpreter {
            Some((path, file, elf)) => Some(elf.load(path, file, space, space.place_of(file.as_raw_fd()))?),
            None => None,
        };
        space.set_brk(program.end.next_multiple_of(PAGE_SIZE));
        let (size, top) = self.map_stack(space)?;
        let stack = Stack {
            args: &self.args,
            env,
            name: self.name.as_os_str(),
            random: random[..16].try_into().expect("16 bytes"),
            aux: stack::aux_vector(&program, interpreter.map_or(0, |i| i.bias), cpu),
        };
        let (placed, bytes) = stack.build(top);
        let sp = placed.sp;
        // The kernel leaves the program at least a quarter of the stack limit.
        if bytes.len() as u64 > size - size / 4 || space.mem.write(sp, &bytes).is_none() {
            return Err(LoadError::new(&self.name, Why::Io(io::Error::from_raw_os_error(libc::E2BIG))));
        }
        let mut state = CpuState::long64(3);
        state.rflags |= crate::cpu::Rflags::IF;
        // What a process sees by SGDT, SIDT and STR: the kernel answers for the CPU under UMIP (arch/x86/kernel/umip.c).
        state.gdtr = Table { base: 0xffff_ffff_fffe_0000, limit: 0 };
        state.idtr = Table { base: 0xffff_ffff_ffff_0000, limit: 0 };
        state.tr.selector = 0x40;
        state.rip = interpreter.map_or(program.entry, |i| i.entry);
        state.gpr[Gpr::Rsp as usize] = sp;
        Ok((state, placed))
    }

    fn map_stack(&self, space: &AddressSpace) -> Result<(u64, u64), LoadError> {
        let limit = host::stack_limit();
        // An unlimited stack gets what nobody will miss: pages appear on first use only.
        let size = limit.clamp(128 << 10, 1 << 30) & !(PAGE_SIZE - 1);
        let exec = if self.elf.executable_stack { libc::PROT_EXEC } else { 0 };
        let prot = (libc::PROT_READ | libc::PROT_WRITE | exec) as u64;
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK) as u64;
        let at =
            space.map(&Mapping { addr: 0, len: size + STACK_GAP, prot, flags, fd: -1, offset: 0, name: "[stack]" });
        if at < 0 {
            return Err(LoadError::new(&self.name, Why::NoMemory { bytes: size, errno: -at as i32 }));
        }
        // The gap stays ours: for the guest nothing is mapped there, and the host puts nothing there.
        let gap = at as u64;
        space.unmap(gap, STACK_GAP);
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE) as u64;
        host::host_call(libc::SYS_mmap as u64, [gap, STACK_GAP, libc::PROT_NONE as u64, flags, u64::MAX, 0]);
        *space.gap.lock().expect("no panic under the lock") = gap..gap + STACK_GAP;
        let at = gap + STACK_GAP;
        // Few programs need more than some pages of it; clearing two megabytes at the first touch is most of a short program's time.
        host::host_call(libc::SYS_madvise as u64, [at, size, libc::MADV_NOHUGEPAGE as u64, 0, 0, 0]);
        Ok((size, at + size))
    }
}

/// What the kernel leaves free below a stack, so that an overflow faults (`stack_guard_gap`, 256 pages).
const STACK_GAP: u64 = 256 * PAGE_SIZE;

/// Position-independent programs go below bivisor itself (which the kernel puts above 0x5555_5555_4000), with room for the heap
/// between, and inside what sanitizers expect of a program's addresses.
fn pie_base(random: &[u8]) -> u64 {
    let r = u64::from_le_bytes(random.try_into().unwrap_or_default());
    // Once for a host process and those it forks: programs that these execute one after the other have the same code at the same place.
    static R: OnceLock<u64> = OnceLock::new();
    let r = R.get_or_init(|| r);
    let spread = if host::randomizes() { (r % (0x40_0000_0000 / PAGE_SIZE)) * PAGE_SIZE } else { 0 };
    0x5500_0000_0000 + spread
}

fn read_head(file: &File, head: &mut [u8; HEAD]) -> io::Result<usize> {
    let mut len = 0;
    while len < HEAD {
        match file.read_at(&mut head[len..], len as u64)? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

/// Opens for execution: a regular file with an execute bit for us (and readable, which execve itself does not ask for).
fn open_executable(path: &Path) -> Result<File, LoadError> {
    let data = std::fs::metadata(path).map_err(|e| LoadError::io(path, &e))?;
    if data.is_dir() {
        return Err(LoadError::new(path, Why::Directory));
    }
    if !data.is_file() {
        return Err(LoadError::new(path, Why::NotRegular));
    }
    if !host::may_execute(path) {
        return Err(LoadError::new(path, Why::Denied("permission denied: it is not executable, see chmod +x")));
    }
    File::open(path).map_err(|e| match e.raw_os_error() {
        Some(libc::EACCES) => {
            LoadError::new(path, Why::Denied("permission denied: it is not readable, which bivisor needs"))
        }
        _ => LoadError::io(path, &e),
    })
}

/// The `#!` line by the kernel's rules (fs/binfmt_script.c): interpreter, and all the rest of the line as one argument. `None` if it
/// is no script, names nothing, or the name does not fit into what the kernel looks at.
fn parse_script(head: &[u8]) -> Option<(&OsStr, Option<&OsStr>)> {
    let line = head.strip_prefix(b"#!")?;
    let blank = |c: &u8| *c == b' ' || *c == b'\t';
    let (line, whole) = match line.iter().position(|&c| c == b'\n') {
        Some(end) => (&line[..end], true),
        None => (line, head.len() < HEAD),
    };
    let line = line.split(|&c| c == 0).next().unwrap_or_default();
    let start = line.iter().position(|c| !blank(c))?;
    let line = &line[start..];
    let line = &line[..=line.iter().rposition(|c| !blank(c))?];
    match line.iter().position(blank) {
        Some(end) => {
            let rest = &line[end..];
            let rest = &rest[rest.iter().position(|c| !blank(c))?..];
            Some((OsStr::from_bytes(&line[..end]), Some(OsStr::from_bytes(rest))))
        }
        // The name may go on after what was read.
        None if !whole => None,
        None => Some((OsStr::from_bytes(line), None)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_lines() {
        let s = |line: &'static [u8]| {
            parse_script(line).map(|(i, a)| (i.to_str().unwrap(), a.map(|a| a.to_str().unwrap())))
        };
        assert_eq!(s(b"#!/bin/sh\necho"), Some(("/bin/sh", None)));
        assert_eq!(s(b"#! /usr/bin/env  python3 -u \nx"), Some(("/usr/bin/env", Some("python3 -u"))));
        assert_eq!(s(b"#!\t/bin/awk\t-f\t\n"), Some(("/bin/awk", Some("-f"))));
        assert_eq!(s(b"#!/bin/sh"), Some(("/bin/sh", None)), "no newline, short file");
        assert_eq!(s(b"#!\n/bin/sh"), None);
        assert_eq!(s(b"#!   \n"), None);
        assert_eq!(s(b"echo"), None);
        let long: &'static [u8] = Vec::leak([b"#!/".as_slice(), &[b'a'; 300]].concat());
        assert_eq!(s(&long[..256]), None, "a name cut off");
    }
}
