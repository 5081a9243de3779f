//! What the tests share: skipping loudly, and guest memory.
#![allow(unsafe_code, dead_code)]

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::host::fds;
use bivisor_emulator::isa::Gpr;
use bivisor_emulator::mem::{FlatSpace, GuestMemory, Prot, Vma};
use bivisor_kvm_backend::{KvmVm, host};
use std::sync::Arc;

/// Says why a test does nothing.
pub fn skip(reason: &str) {
    println!("SKIPPED: kvm: {reason}");
}

/// A virtual machine that can run processes, or the reason is printed.
pub fn process_vm() -> Option<KvmVm> {
    if !host().usable_for_process {
        skip(&host().reason);
        return None;
    }
    Some(KvmVm::new(Arc::new(CpuModel::host())).expect("the probe says that it works"))
}

/// Pages of the guest in the host's address space.
pub struct Flat {
    pub mem: GuestMemory,
}

impl Flat {
    pub fn new() -> Flat {
        Flat { mem: GuestMemory::Flat(FlatSpace::new()) }
    }

    pub fn flat(&self) -> &FlatSpace {
        self.mem.flat().expect("made so")
    }

    /// Maps `pages` pages somewhere and gives the address.
    pub fn map(&self, pages: u64, prot: Prot) -> u64 {
        let len = pages * 4096;
        // SAFETY: a fresh anonymous mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        let start = at as u64;
        self.flat().insert(Vma {
            start,
            end: start + len,
            prot,
            shared: false,
            name: "".into(),
            offset: 0,
            backing: None,
        });
        start
    }

    /// Changes rights as mprotect(2) of a guest would.
    pub fn protect(&self, start: u64, pages: u64, prot: Prot) {
        // SAFETY: pages from `map`.
        let r = unsafe { libc::mprotect(start as *mut _, pages as usize * 4096, FlatSpace::host_prot(prot)) };
        assert_eq!(r, 0);
        self.flat().protect(start..start + pages * 4096, prot);
    }

    pub fn unmap(&self, start: u64, pages: u64) {
        // SAFETY: pages from `map`.
        assert_eq!(unsafe { libc::munmap(start as *mut _, pages as usize * 4096) }, 0);
        self.flat().remove(start..start + pages * 4096);
    }

    /// A page with code.
    pub fn code(&self, bytes: &[u8]) -> u64 {
        let at = self.map(1, Prot::READ | Prot::EXEC);
        self.write(at, bytes);
        at
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        // SAFETY: pages from `map`, made writable there.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }

    pub fn read_u64(&self, at: u64) -> u64 {
        // SAFETY: pages from `map`.
        unsafe { (at as *const u64).read_unaligned() }
    }
}

/// 64-bit user code as on Linux.
pub fn user(rip: u64, rsp: u64) -> CpuState {
    let mut s = CpuState::long64(3);
    s.rip = rip;
    s.gpr[Gpr::Rsp as usize] = rsp;
    s.rflags = Rflags::FIXED | Rflags::IF;
    s
}

/// Runs `f` in a forked child and gives its result as exit status.
pub fn in_child(f: impl FnOnce() -> i32) -> i32 {
    // Other tests run in threads: none may hold this lock then.
    let lock = fds::lock_for_fork();
    // SAFETY: the child runs `f` and leaves without unwinding or running destructors.
    unsafe {
        let forked = libc::fork();
        drop(lock);
        match forked {
            0 => {
                let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(99);
                libc::_exit(code)
            }
            child => {
                let mut status = 0;
                assert_eq!(libc::waitpid(child, &mut status, 0), child);
                assert!(libc::WIFEXITED(status), "{status:#x}");
                libc::WEXITSTATUS(status)
            }
        }
    }
}
