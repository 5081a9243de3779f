//! What crossing a border costs here: natively, and in a guest of this host's KVM.

use crate::native::Native;
use bivisor_kvm_backend::sample::Samples;
use serde::Serialize;
use std::time::Instant;

/// Nanoseconds each; `null` where it was not measured.
#[derive(Debug, Default, Serialize)]
pub struct Costs {
    /// A system call of the host and back (getppid).
    pub syscall: Option<f64>,
    /// A page fault of the host's: the first touch of a page.
    pub page_fault: Option<f64>,
    /// CPUID.
    pub cpuid: Option<f64>,
    /// RDTSC.
    pub rdtsc: Option<f64>,
    /// A fault to another process and back: what trap-and-emulate pays each time.
    pub trap: Option<f64>,
    /// From a KVM guest to the monitor and back.
    pub kvm_exit: Option<f64>,
    /// CPUID in a KVM guest.
    pub kvm_cpuid: Option<f64>,
    /// RDTSC in a KVM guest.
    pub kvm_rdtsc: Option<f64>,
    /// One register instruction of user code in a KVM guest.
    pub kvm_cpl3: Option<f64>,
    /// One register instruction of kernel code in a KVM guest.
    pub kvm_cpl0: Option<f64>,
}

const CPUID: &[u8] = &[0x31, 0xc0, 0x0f, 0xa2];
const RDTSC: &[u8] = &[0x0f, 0x31];
const NOP: &[u8] = &[0x48, 0xff, 0xc0];

fn best(times: usize, mut f: impl FnMut() -> f64) -> f64 {
    (0..times).map(|_| f()).fold(f64::MAX, f64::min)
}

/// A system call and back.
pub fn syscall() -> f64 {
    const TURNS: u32 = 20_000;
    best(5, || {
        let start = Instant::now();
        for _ in 0..TURNS {
            std::hint::black_box(std::os::unix::process::parent_id());
        }
        start.elapsed().as_nanos() as f64 / f64::from(TURNS)
    })
}

fn page_fault() -> Option<f64> {
    const PAGES: usize = 256;
    let touch = || -> Option<f64> {
        let mut map = memmap2::MmapOptions::new().len(PAGES * 4096).map_anon().ok()?;
        let start = Instant::now();
        for page in map.chunks_mut(4096) {
            page[0] = 1;
        }
        Some(start.elapsed().as_nanos() as f64 / PAGES as f64)
    };
    (0..5).filter_map(|_| touch()).reduce(f64::min)
}

/// Measures what can be measured; `exit` is the probe's.
pub fn measure(native: Option<&mut Native>, kvm: Option<&mut Samples>, exit: u64) -> Costs {
    let mut costs = Costs { syscall: Some(syscall()), page_fault: page_fault(), ..Costs::default() };
    if let Some(native) = native {
        costs.cpuid = native.cost(CPUID, 3_000).ok().flatten();
        costs.rdtsc = native.cost(RDTSC, 300_000).ok().flatten();
        costs.trap = native.trap_cost().ok();
    }
    if let Some(kvm) = kvm {
        costs.kvm_exit = Some(exit as f64);
        costs.kvm_cpuid = kvm.cost(3, CPUID, 1_000).ok().flatten();
        costs.kvm_rdtsc = kvm.cost(3, RDTSC, 20_000).ok().flatten();
        costs.kvm_cpl3 = kvm.cost(3, NOP, 1_000_000).ok().flatten();
        costs.kvm_cpl0 = kvm.cost(0, NOP, 1_000).ok().flatten();
    }
    costs
}
