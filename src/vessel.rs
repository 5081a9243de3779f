//! A confined child process in which code runs at CPL 3 on the host: it owns nothing but the memory it is given, no system call of its
//! own is ever carried out, and every signal comes to us instead (ptrace(2), PTRACE_SYSEMU).
//!
//! The child is a fork of us that has unmapped everything but one page with a SYSCALL instruction, through which we make it map memory.
#![allow(unsafe_code)]

use anyhow::{Result, bail};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

pub use libc::user_regs_struct as Registers;

/// The page with the SYSCALL instruction; nothing of a guest's may lie there.
pub const STUB: u64 = 0x6fff_0000_0000;
/// End of user addresses with four levels of page tables.
const TOP: u64 = 0x7fff_ffff_f000;
/// Below it Linux maps nothing for most users (vm.mmap_min_addr).
pub const LOWEST: u64 = 0x1_0000;
const PAGE: u64 = 4096;
/// How long the child runs at most before we can look around.
pub const TICK: Duration = Duration::from_millis(10);
const PTRACE_SYSEMU: u32 = 31;
const PTRACE_SYSEMU_SINGLESTEP: u32 = 32;
const PTRACE_GETREGSET: u32 = 0x4204;
const PTRACE_SETREGSET: u32 = 0x4205;
const NT_X86_XSTATE: usize = 0x202;
const PTRACE_GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const RSEQ_SIGNATURE: u32 = 0x5305_3053;

/// What PTRACE_GET_RSEQ_CONFIGURATION tells (ptrace(2)).
#[repr(C)]
#[derive(Default)]
struct Rseq {
    address: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// Why the child stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stop {
    /// The signal.
    pub signal: i32,
    /// Its code: SI_KERNEL for #GP, SEGV_MAPERR and SEGV_ACCERR for page faults.
    pub code: i32,
    /// The address of a page fault.
    pub address: u64,
    /// It came to a system call, which was not carried out; RIP is past it.
    pub syscall: bool,
}

/// The child.
pub struct Vessel {
    pid: i32,
    /// The thread that may trace it.
    owner: i32,
}

fn last() -> io::Error {
    io::Error::last_os_error()
}

fn tid() -> i32 {
    // SAFETY: no arguments.
    unsafe { libc::syscall(libc::SYS_gettid) as i32 }
}

/// Where the C library has registered restartable sequences for this thread; the child must not keep them without its memory.
fn rseq_area() -> Option<u64> {
    // SAFETY: a constant name; the symbol, if there is one, is a ptrdiff_t of the C library, relative to the thread pointer.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let fs: u64;
        std::arch::asm!("mov {}, fs:[0]", out(reg) fs, options(nostack, readonly));
        (!offset.is_null()).then(|| fs.wrapping_add_signed(*offset as i64))
    }
}

impl Vessel {
    /// An empty child.
    ///
    /// # Errors
    /// What the host refuses: processes, or tracing them.
    pub fn new() -> Result<Vessel> {
        let rseq = rseq_area();
        // SAFETY: the child of a fork of a program with threads; it makes system calls only.
        let pid = unsafe { libc::fork() };
        if pid < 0 {
            bail!("no child process: {}", last());
        }
        if pid == 0 {
            become_vessel(rseq);
        }
        let mut vessel = Vessel { pid, owner: tid() };
        let first = vessel.wait()?;
        if ![libc::SIGSTOP, libc::SIGALRM].contains(&first.signal) {
            bail!(
                "the host refuses ptrace(2): is it forbidden by a container's rules? Allow it (for Docker: --cap-add SYS_PTRACE)"
            );
        }
        vessel.forget_rseq()?;
        for (start, end) in [(0, STUB), (STUB + PAGE, TOP)] {
            vessel.call(libc::SYS_munmap, [start, end - start, 0, 0, 0, 0])?;
        }
        Ok(vessel)
    }

    /// May this thread use it?
    pub fn is_ours(&self) -> bool {
        self.owner == tid()
    }

    /// Nanoseconds that it has had of a processor.
    pub fn processor_time(&self) -> f64 {
        // SAFETY: all zeros is a valid timespec; the clock's number is that of clock_getcpuclockid(3) for our own child.
        unsafe {
            let mut t: libc::timespec = std::mem::zeroed();
            libc::clock_gettime(!self.pid << 3 | 2, &raw mut t);
            t.tv_sec as f64 * 1e9 + t.tv_nsec as f64
        }
    }

    fn ptrace(&self, request: u32, address: usize, data: usize) -> io::Result<i64> {
        // SAFETY: the requests used here take integers, or pointers to memory that the caller lends for the call.
        let r = unsafe {
            *libc::__errno_location() = 0;
            libc::ptrace(request, self.pid, address, data)
        };
        // A word that is read may be any.
        if r == -1 && last().raw_os_error() != Some(0) { Err(last()) } else { Ok(r) }
    }

    /// In a program that is linked statically the child cannot know where the C library has registered restartable sequences.
    fn forget_rseq(&mut self) -> Result<()> {
        let mut rseq = Rseq::default();
        let known = self.ptrace(PTRACE_GET_RSEQ_CONFIGURATION, size_of::<Rseq>(), &raw mut rseq as usize).is_ok();
        if known && rseq.address != 0 {
            let arguments = [rseq.address, rseq.size.into(), 1, rseq.signature.into(), 0, 0];
            self.call(libc::SYS_rseq, arguments)?;
        }
        Ok(())
    }

    fn wait(&mut self) -> Result<Stop> {
        let mut status = 0;
        loop {
            // SAFETY: our own child.
            let r = unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) };
            if r == self.pid {
                break;
            }
            if r < 0 && last().kind() != io::ErrorKind::Interrupted {
                bail!("the child is lost: {}", last());
            }
        }
        if !libc::WIFSTOPPED(status) {
            bail!("the child ended: status {status:#x}");
        }
        let signal = libc::WSTOPSIG(status);
        // SAFETY: all zeros is a valid siginfo_t; the kernel fills it.
        let info = unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            if libc::ptrace(libc::PTRACE_GETSIGINFO, self.pid, 0, &raw mut info) < 0 {
                info.si_code = 0;
            }
            info
        };
        let faults = [libc::SIGSEGV, libc::SIGBUS].contains(&signal);
        // SAFETY: these signals, raised by hardware, have an address.
        let address = if faults && info.si_code > 0 { unsafe { info.si_addr() as u64 } } else { 0 };
        // A stop at a system call has SIGTRAP itself as its code.
        let syscall = signal == libc::SIGTRAP && info.si_code == libc::SIGTRAP;
        Ok(Stop { signal, code: info.si_code, address, syscall })
    }

    /// The registers.
    ///
    /// # Errors
    /// The child is gone.
    pub fn registers(&self) -> Result<Registers> {
        // SAFETY: all zeros is valid; the kernel fills it.
        let mut r: Registers = unsafe { std::mem::zeroed() };
        self.ptrace(libc::PTRACE_GETREGS, 0, &raw mut r as usize)?;
        Ok(r)
    }

    /// Sets the registers; segment selectors are to be the host's.
    ///
    /// # Errors
    /// The child is gone, or a value that no user may have.
    pub fn set_registers(&self, r: &Registers) -> Result<()> {
        self.ptrace(libc::PTRACE_SETREGS, 0, std::ptr::from_ref(r) as usize)?;
        Ok(())
    }

    /// The XSAVE image.
    ///
    /// # Errors
    /// The child is gone.
    pub fn extended(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0u8; 16 << 10];
        let mut io = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        self.ptrace(PTRACE_GETREGSET, NT_X86_XSTATE, &raw mut io as usize)?;
        bytes.truncate(io.iov_len);
        Ok(bytes)
    }

    /// Sets it, to an image of the same length.
    ///
    /// # Errors
    /// The kernel does not like it.
    pub fn set_extended(&self, bytes: &mut [u8]) -> Result<()> {
        let mut io = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        self.ptrace(PTRACE_SETREGSET, NT_X86_XSTATE, &raw mut io as usize)?;
        Ok(())
    }

    /// Goes on until a signal or a system call; if `single`, one instruction. SIGALRM is the clock's: it comes every [`TICK`].
    ///
    /// # Errors
    /// The child is gone.
    pub fn run(&mut self, single: bool) -> Result<Stop> {
        self.ptrace(if single { PTRACE_SYSEMU_SINGLESTEP } else { PTRACE_SYSEMU }, 0, 0)?;
        self.wait()
    }

    /// As [`Vessel::run`], without the clock's ticks, and at most so long.
    ///
    /// # Errors
    /// As there, and when the time is over.
    pub fn run_for(&mut self, limit: Duration) -> Result<Stop> {
        let start = Instant::now();
        loop {
            let stop = self.run(false)?;
            if stop.signal != libc::SIGALRM {
                return Ok(stop);
            }
            if start.elapsed() > limit {
                bail!("still running after {limit:?}");
            }
        }
    }

    /// Makes the child do a system call.
    fn call(&mut self, number: i64, arguments: [u64; 6]) -> Result<u64> {
        let before = self.registers()?;
        let mut r = before;
        r.rip = STUB;
        r.rax = number as u64;
        // No system call is to be restarted.
        r.orig_rax = u64::MAX;
        [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = arguments;
        self.set_registers(&r)?;
        let stop = loop {
            self.ptrace(libc::PTRACE_SINGLESTEP, 0, 0)?;
            let stop = self.wait()?;
            if stop.signal != libc::SIGALRM {
                break stop;
            }
        };
        let after = self.registers()?;
        self.set_registers(&Registers { orig_rax: u64::MAX, ..before })?;
        if stop.signal != libc::SIGTRAP {
            bail!("the child got signal {} in a system call of ours", stop.signal);
        }
        if after.rax > u64::MAX - 4095 {
            bail!("the child's system call {number}: {}", io::Error::from_raw_os_error(-(after.rax as i64) as i32));
        }
        Ok(after.rax)
    }

    /// Maps fresh memory.
    ///
    /// # Errors
    /// The host's.
    pub fn map(&mut self, at: u64, len: u64, protection: i32) -> Result<()> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        self.map_with(at, len, protection, flags, -1, 0)
    }

    /// Maps a file that was open when the child was made.
    ///
    /// # Errors
    /// The host's.
    pub fn map_file(&mut self, at: u64, len: u64, protection: i32, file: &impl AsRawFd, offset: u64) -> Result<()> {
        self.map_with(at, len, protection, libc::MAP_SHARED | libc::MAP_FIXED, file.as_raw_fd(), offset)
    }

    fn map_with(&mut self, at: u64, len: u64, protection: i32, flags: i32, fd: RawFd, offset: u64) -> Result<()> {
        if at < STUB + PAGE && at.saturating_add(len) > STUB {
            bail!("the address {at:#x} is taken");
        }
        self.call(libc::SYS_mmap, [at, len, protection as u64, flags as u64, fd as u64, offset])?;
        Ok(())
    }

    /// Unmaps all that was mapped below the page of ours.
    ///
    /// # Errors
    /// The host's.
    pub fn unmap_all(&mut self) -> Result<()> {
        self.call(libc::SYS_munmap, [0, STUB, 0, 0, 0, 0])?;
        Ok(())
    }

    /// Writes to the child's memory, whatever its protection.
    ///
    /// # Errors
    /// There is none.
    pub fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        // Not by /proc/PID/mem: in a container /proc may be another namespace's.
        for (i, part) in bytes.chunks(8).enumerate() {
            let at = at as usize + 8 * i;
            let mut word = [0; 8];
            if part.len() < 8 {
                word = self.ptrace(libc::PTRACE_PEEKDATA, at, 0)?.to_le_bytes();
            }
            word[..part.len()].copy_from_slice(part);
            self.ptrace(libc::PTRACE_POKEDATA, at, u64::from_le_bytes(word) as usize)?;
        }
        Ok(())
    }
}

impl Drop for Vessel {
    fn drop(&mut self) {
        // SAFETY: our own child.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WALL);
        }
    }
}

/// The child's part: system calls only.
fn become_vessel(rseq: Option<u64>) -> ! {
    // SAFETY: system calls of the child alone; memory is only mapped where nothing of ours lies.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        if let Some(area) = rseq {
            // It must be the length that was registered, which depends on the C library's version.
            for len in [32, 28, 64, 20] {
                libc::syscall(libc::SYS_rseq, area, len, 1, RSEQ_SIGNATURE);
            }
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let page = libc::mmap(STUB as *mut _, PAGE as usize, rw, flags, -1, 0);
        if page == libc::MAP_FAILED || libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) < 0 {
            libc::_exit(1);
        }
        // syscall; int3
        page.cast::<[u8; 3]>().write([0x0f, 0x05, 0xcc]);
        libc::mprotect(page, PAGE as usize, libc::PROT_READ | libc::PROT_EXEC);
        let tick = libc::timeval { tv_sec: 0, tv_usec: TICK.as_micros() as i64 };
        let timer = libc::itimerval { it_interval: tick, it_value: tick };
        libc::setitimer(libc::ITIMER_REAL, &raw const timer, std::ptr::null_mut());
        libc::raise(libc::SIGSTOP);
        libc::_exit(1);
    }
}
