//! The host without running anything: CPU, kernel, /dev/kvm, modules.

use serde::Serialize;
use std::arch::x86_64::__cpuid;

/// The processor.
#[derive(Debug, Serialize)]
pub struct Cpu {
    /// Its name for itself.
    pub model: String,
    /// Who made it.
    pub vendor: String,
    /// What it offers of hardware virtualization here: "vt-x", "svm" or "none".
    pub virtualization: &'static str,
    /// A hypervisor runs below us.
    pub hypervisor: Option<String>,
    /// CR4.UMIP is in use.
    pub umip: bool,
    /// Flags that matter here and are there.
    pub features: Vec<&'static str>,
}

const INTERESTING: [&str; 14] = [
    "fsgsbase", "avx", "avx2", "avx512f", "bmi2", "ept", "npt", "vpid", "smep", "smap", "umip", "rdtscp", "pcid",
    "x2apic",
];

/// The flags that /proc/cpuinfo shows for the first processor.
pub fn cpu_flags() -> Vec<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let line = text.lines().find(|l| l.starts_with("flags")).unwrap_or_default();
    line.split(':').nth(1).unwrap_or_default().split_whitespace().map(str::to_string).collect()
}

fn registers_as_text(values: &[u32]) -> String {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    String::from_utf8_lossy(&bytes).trim_matches(['\0', ' ']).to_string()
}

/// Looks at it.
pub fn cpu() -> Cpu {
    let flags = cpu_flags();
    let has = |f: &str| flags.iter().any(|x| x == f);
    let leaf0 = __cpuid(0);
    let brand: Vec<u32> = match __cpuid(0x8000_0000).eax >= 0x8000_0004 {
        true => (0x8000_0002..=0x8000_0004)
            .flat_map(|l| {
                let r = __cpuid(l);
                [r.eax, r.ebx, r.ecx, r.edx]
            })
            .collect(),
        false => Vec::new(),
    };
    let hypervisor = (__cpuid(1).ecx >> 31 != 0).then(|| {
        let r = __cpuid(0x4000_0000);
        registers_as_text(&[r.ebx, r.ecx, r.edx])
    });
    Cpu {
        model: registers_as_text(&brand),
        vendor: registers_as_text(&[leaf0.ebx, leaf0.edx, leaf0.ecx]),
        virtualization: match (has("vmx"), has("svm")) {
            (true, _) => "vt-x",
            (_, true) => "svm",
            _ => "none",
        },
        hypervisor,
        umip: has("umip"),
        features: INTERESTING.into_iter().filter(|f| has(f)).collect(),
    }
}
