//! The operations as far as a process can do them: at CPL 3 on the host itself, or the nearest thing that its kernel offers instead.
//!
//! This is measured in a process of its own (`bivisor compare --natively`, hidden), once as it is and once in fresh namespaces, as a
//! container has them: signal handlers and children are then nobody else's.
#![allow(unsafe_code)]

use super::nano::processor_time;
use crate::native::Native;
use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Instant;

/// What a process gets.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Natively {
    /// Nanoseconds: the median, the smallest, the largest.
    pub ns: [f64; 3],
}

/// What an operation of a kernel is for a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The same instructions at CPL 3.
    Code(&'static [u8]),
    /// What the host's kernel offers for it.
    Instead(Instead),
    /// Nothing: why.
    No(&'static str),
}

/// What the kernel offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instead {
    /// A system call.
    Syscall,
    /// SIGSEGV for an absent page, its handler, and back.
    PageFault,
    /// SIGFPE, its handler, and back.
    Division,
    /// A signal to itself, its handler, and back.
    Signal,
    /// mprotect(2) that changes nothing.
    Protect,
    /// mprotect(2) to nothing and back, then a touch.
    Remap,
    /// A byte through a pipe to another process on the same processor.
    Switch,
}

impl Instead {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Instead::Syscall => "getppid(2)",
            Instead::PageFault => "SIGSEGV, its handler, sigreturn(2)",
            Instead::Division => "SIGFPE, its handler, sigreturn(2)",
            Instead::Signal => "a signal to itself, its handler, sigreturn(2)",
            Instead::Protect => "mprotect(2) that changes nothing",
            Instead::Remap => "mprotect(2) twice and a touch",
            Instead::Switch => "a byte through a pipe to another process on the same processor",
        }
    }
}

/// Why a process cannot do it.
pub const PRIVILEGED: Way = Way::No("privileged: a process gets #GP");
/// The same of ports.
pub const PORTS: Way = Way::No("a process has IOPL 0 and no I/O bitmap: #GP; and ports belong to the host's devices");

/// Bytes by which the handler skips what faulted.
static SKIP: AtomicI64 = AtomicI64::new(0);

extern "C" fn skip(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO its ucontext.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_RIP as usize] += SKIP.load(Ordering::Relaxed);
}

fn handle(signal: i32, length: i64) -> io::Result<()> {
    SKIP.store(length, Ordering::Relaxed);
    // SAFETY: all zeros is a valid sigaction; the handler touches nothing but its context and an atomic.
    let done = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = skip as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(signal, &raw const action, std::ptr::null_mut())
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn protect(at: *mut libc::c_void, protection: i32) {
    // SAFETY: a page of our own that no reference points into.
    unsafe { libc::mprotect(at, PAGE, protection) };
}

const PAGE: usize = 4096;
const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Median, smallest and largest of several times; `once` does it so many times and says how long that took.
fn sample(samples: usize, mut once: impl FnMut(u32) -> io::Result<f64>) -> io::Result<[f64; 3]> {
    let mut turns = 16;
    while once(turns)? < 3e6 && turns < 1 << 22 {
        turns *= 2;
    }
    let mut seen = (0..samples).map(|_| Ok(once(turns)? / f64::from(turns))).collect::<io::Result<Vec<f64>>>()?;
    seen.sort_by(f64::total_cmp);
    Ok([seen[seen.len() / 2], seen[0], seen[seen.len() - 1]])
}

fn timed(mut f: impl FnMut()) -> impl FnMut(u32) -> io::Result<f64> {
    move |turns| {
        let start = processor_time();
        (0..turns).for_each(|_| f());
        Ok(processor_time() - start)
    }
}

fn instead(what: Instead, samples: usize) -> io::Result<[f64; 3]> {
    let map = memmap2::MmapOptions::new().len(PAGE).map_anon()?;
    let at = map.as_ptr() as *mut libc::c_void;
    match what {
        Instead::Syscall => sample(
            samples,
            timed(|| {
                std::hint::black_box(std::os::unix::process::parent_id());
            }),
        ),
        Instead::PageFault => {
            protect(at, libc::PROT_NONE);
            handle(libc::SIGSEGV, 2)?;
            // mov al, [rdi]
            // SAFETY: it faults, and the handler skips its two bytes.
            sample(samples, timed(|| unsafe { std::arch::asm!(".byte 0x8a, 0x07", in("rdi") at, out("al") _) }))
        }
        Instead::Division => {
            handle(libc::SIGFPE, 2)?;
            // div ecx
            // SAFETY: it faults, and the handler skips its two bytes.
            let f = || unsafe {
                std::arch::asm!(".byte 0xf7, 0xf1", in("ecx") 0, inout("eax") 1 => _, inout("edx") 0 => _)
            };
            sample(samples, timed(f))
        }
        Instead::Signal => {
            handle(libc::SIGUSR1, 0)?;
            // SAFETY: the handler of that signal was set.
            sample(
                samples,
                timed(|| unsafe {
                    std::hint::black_box(libc::raise(libc::SIGUSR1));
                }),
            )
        }
        Instead::Protect => sample(samples, timed(|| protect(at, RW))),
        Instead::Remap => sample(
            samples,
            timed(|| {
                protect(at, libc::PROT_NONE);
                protect(at, RW);
                // SAFETY: the page is there and may be read.
                unsafe { std::ptr::read_volatile(at.cast::<u8>()) };
            }),
        ),
        Instead::Switch => switches(samples),
    }
}

/// A switch to another process: half a round trip of a byte through two pipes, both processes on one processor.
fn switches(samples: usize) -> io::Result<[f64; 3]> {
    let (mut to, mut from) = ([0; 2], [0; 2]);
    // SAFETY: two arrays of two descriptors; plain calls; the child of this process with one thread only reads and writes.
    let child = unsafe {
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().max(0) as usize, &mut one);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const one);
        if libc::pipe(to.as_mut_ptr()) < 0 || libc::pipe(from.as_mut_ptr()) < 0 {
            return Err(io::Error::last_os_error());
        }
        libc::fork()
    };
    let mut byte = [0u8];
    // SAFETY: one byte of ours.
    let mut pass = |read: i32, write: i32| unsafe {
        libc::read(read, byte.as_mut_ptr().cast(), 1) == 1 && libc::write(write, byte.as_ptr().cast(), 1) == 1
    };
    match child {
        0 => {
            // SAFETY: the other end would keep this child alive.
            unsafe { libc::close(to[1]) };
            while pass(to[0], from[1]) {}
            // SAFETY: nothing of the parent's is to be undone here.
            unsafe { libc::_exit(0) };
        }
        -1 => Err(io::Error::last_os_error()),
        child => {
            // SAFETY: one byte for the first turn.
            unsafe { libc::write(to[1], [0u8].as_ptr().cast(), 1) };
            let seen = sample(samples, |turns| {
                let start = Instant::now();
                let ended = (0..turns).all(|_| pass(from[0], to[1]));
                if ended {
                    Ok(start.elapsed().as_nanos() as f64 / 2.0)
                } else {
                    Err(io::Error::other("the child is gone"))
                }
            });
            // SAFETY: our child and our descriptors.
            unsafe {
                libc::kill(child, libc::SIGKILL);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            seen
        }
    }
}

/// Measures everything that is asked for, prints one JSON object.
///
/// # Errors
/// It cannot be printed.
pub fn run(operations: &[(&'static str, Way)], samples: usize) -> Result<i32> {
    let mut out: BTreeMap<&str, std::result::Result<Natively, String>> = BTreeMap::new();
    let mut native = Native::new();
    for (name, way) in operations {
        let value = match way {
            Way::No(why) => Err((*why).to_string()),
            Way::Instead(what) => instead(*what, samples).map(|ns| Natively { ns }).map_err(|e| e.to_string()),
            Way::Code(code) => match &mut native {
                Err(e) => Err(format!("{e:#}")),
                Ok(native) => (0..samples.div_ceil(2))
                    .map(|_| {
                        let mut cost = |turns| native.cost(code, turns)?.ok_or_else(|| anyhow!("it faults"));
                        // Milliseconds of it, so that the way to the child and back does not matter.
                        let rough: f64 = cost(3_000)?;
                        if rough < 300.0 { cost((3e6 / rough.max(1.0)) as u32) } else { Ok(rough) }
                    })
                    .collect::<Result<Vec<f64>>>()
                    .map(|mut seen| {
                        seen.sort_by(f64::total_cmp);
                        Natively { ns: [seen[seen.len() / 2], seen[0], seen[seen.len() - 1]] }
                    })
                    .map_err(|e| format!("{e:#}")),
            },
        };
        out.insert(name, value);
    }
    println!("{}", serde_json::to_string(&out)?);
    Ok(0)
}

/// By operation.
pub type Measured = BTreeMap<String, std::result::Result<Natively, String>>;

/// Starts [`run`] in a process of its own; in fresh namespaces if `apart`.
///
/// # Errors
/// The host gives none.
pub fn measure(apart: bool, only: &[String], full: bool) -> Result<Measured> {
    let this = std::env::current_exe()?;
    let mut command = match apart {
        false => Command::new(&this),
        true => {
            let mut c = Command::new("unshare");
            c.args(super::program::NAMESPACES).arg(&this);
            c
        }
    };
    command.args(["compare", "--natively"]).args(full.then_some("--full")).arg("--").args(only);
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = child.with_context(|| if apart { "no unshare(1) to make namespaces" } else { "not started" })?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(anyhow!("{}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}
