//! How often a machine's vCPU left its guest, by KVM's own counters (Documentation/virt/kvm/api.rst, KVM_GET_STATS_FD; Linux 5.14), with
//! the basic exit reason of VT-x that each stands for (SDM 3D table C-1).
#![allow(unsafe_code)]

use kvm_ioctls::VcpuFd;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// One counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Its name in the kernel.
    pub name: &'static str,
    /// What it counts.
    pub what: &'static str,
    /// The basic exit reason of VT-x.
    pub vtx: Option<u16>,
}

const fn counter(name: &'static str, vtx: Option<u16>, what: &'static str) -> Counter {
    Counter { name, what, vtx }
}

/// Reasons for which KVM_RUN returns to the monitor (linux/kvm.h), by number.
const RETURNS: [(u32, Counter); 10] = [
    (2, counter("KVM_EXIT_IO", Some(30), "to the monitor: IN or OUT")),
    (4, counter("KVM_EXIT_DEBUG", Some(0), "to the monitor: a single step or breakpoint")),
    (5, counter("KVM_EXIT_HLT", Some(12), "to the monitor: HLT")),
    (6, counter("KVM_EXIT_MMIO", Some(48), "to the monitor: an address without memory")),
    (7, counter("KVM_EXIT_IRQ_WINDOW_OPEN", Some(7), "to the monitor: an interrupt can be taken")),
    (8, counter("KVM_EXIT_SHUTDOWN", Some(2), "to the monitor: a triple fault")),
    (9, counter("KVM_EXIT_FAIL_ENTRY", Some(33), "to the monitor: the guest cannot be entered")),
    (10, counter("KVM_EXIT_INTR", Some(1), "to the monitor: a signal")),
    (17, counter("KVM_EXIT_INTERNAL_ERROR", None, "to the monitor: KVM cannot do an instruction")),
    (39, counter("KVM_EXIT_MEMORY_FAULT", Some(48), "to the monitor: memory that the host refuses")),
];

const OTHER: Counter = counter("KVM_EXIT", None, "to the monitor: another reason");

/// What a reason for which KVM_RUN returns is called.
pub(crate) fn name(reason: u32) -> &'static str {
    RETURNS.iter().find(|(r, _)| *r == reason).map_or(OTHER.name, |(_, c)| c.name)
}

/// KVM's number and name of the exit to the monitor that one with this basic exit reason of VT-x becomes, if it does: KVM handles the others.
pub fn returned(vtx: u16) -> Option<(u32, &'static str)> {
    // Of exceptions only debuggers are told; KVM_EXIT_INTR is of signals.
    RETURNS.iter().find(|(_, c)| !matches!(vtx, 0 | 1) && c.vtx == Some(vtx)).map(|(n, c)| (*n, c.name))
}

/// The number of one of KVM's exits by its name.
pub fn number(name: &str) -> Option<u32> {
    RETURNS.iter().find(|(_, c)| c.name == name).map(|(n, _)| *n)
}

/// How often KVM_RUN returned, by reason.
#[derive(Default)]
pub(crate) struct Returns([u64; RETURNS.len() + 1]);

impl Returns {
    /// Once more, with this `exit_reason`.
    pub fn note(&mut self, reason: u32) {
        let n = RETURNS.iter().position(|(r, _)| *r == reason).unwrap_or(RETURNS.len());
        self.0[n] += 1;
    }

    /// Those that came.
    pub fn all(&self) -> impl Iterator<Item = (Counter, u64)> {
        let counters = RETURNS.iter().map(|(_, c)| *c).chain([OTHER]);
        counters.zip(self.0).filter(|(_, n)| *n > 0)
    }
}

/// Those of linux/arch/x86/kvm/x86.c that tell what the kernel's part did. "exits" counts all exits of the guest, those too that have no
/// counter of their own.
const COUNTERS: [Counter; 10] = [
    counter("exits", None, "all exits, those to the monitor too"),
    counter("invlpg", Some(14), "INVLPG"),
    counter("hypercalls", Some(18), "VMCALL"),
    counter("irq_exits", Some(1), "an interrupt of the host"),
    counter("irq_window_exits", Some(7), "the guest can take an interrupt"),
    counter("nmi_window_exits", Some(8), "the guest can take an NMI"),
    counter("pf_taken", Some(48), "page faults that KVM handled"),
    counter("insn_emulation", None, "instructions emulated in the kernel"),
    counter("insn_emulation_fail", None, "instructions that the kernel gave up"),
    counter("irq_injections", None, "interrupts injected"),
];

/// The kernel's counters of a vCPU, in the order of [`COUNTERS`]; those that this kernel has not are left out.
///
/// # Errors
/// The host's KVM has no counters (Linux before 5.14).
pub(crate) fn read(vcpu: &VcpuFd) -> io::Result<Vec<(Counter, u64)>> {
    // SAFETY: the call takes no argument and gives a new file descriptor, which nobody else owns.
    let file = unsafe {
        let fd = libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        File::from_raw_fd(fd)
    };
    let word = |at: u64| -> io::Result<u32> {
        let mut bytes = [0; 4];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_le_bytes(bytes))
    };
    // struct kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
    let (name_size, count, descriptors, data) = (word(4)?, word(8)?, word(16)?, word(20)?);
    let mut found = Vec::new();
    for n in 0..count.min(1024) {
        // struct kvm_stats_desc: flags, exponent and size (16 bits each), offset, bucket_size, name.
        let at = u64::from(descriptors) + u64::from(n) * (16 + u64::from(name_size));
        let mut name = vec![0; name_size.min(256) as usize];
        file.read_exact_at(&mut name, at + 16)?;
        let end = name.iter().position(|b| *b == 0).unwrap_or(name.len());
        if let Some(i) = COUNTERS.iter().position(|c| c.name.as_bytes() == &name[..end]) {
            let mut value = [0; 8];
            file.read_exact_at(&mut value, u64::from(data) + u64::from(word(at + 8)?))?;
            found.push((i, u64::from_le_bytes(value)));
        }
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(i, v)| (COUNTERS[i], v)).collect())
}
