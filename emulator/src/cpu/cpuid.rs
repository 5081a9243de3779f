//! The CPU we offer: one model, one table of features; what CPUID says (SDM 2A CPUID, APM 3 appendix E) and which instructions exist.
//!
//! x87 and SIMD instructions run on the host, and translated code is the guest's own instructions: no model offers an
//! unprivileged feature that the host lacks. Features of system mode are the interpreter's own work.

use crate::cpu::xsave::{Layout, component};
use crate::cpu::{CpuState, Cr4};
use crate::isa::host_cpu;
use iced_x86::{Code, CpuidFeature as F};
use std::collections::BTreeMap;
use std::sync::OnceLock;

/// Physical and linear address bits offered.
pub const PHYSICAL_BITS: u32 = 48;
/// See [`PHYSICAL_BITS`].
pub const LINEAR_BITS: u32 = 48;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Reg {
    Eax,
    Ebx,
    Ecx,
    Edx,
}
use Reg::{Eax, Ebx, Ecx, Edx};

/// Who carries it out, and so whether the host must have it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    /// The host's own circuits, in thunks or translated code.
    Host,
    /// As `Host`, and the host's operating system must have enabled AVX (512: AVX-512) state.
    Avx,
    Avx512,
    /// Our software: offered whatever the host has.
    Us,
    /// The way the interpreter and the translator run machines: see [`CpuModel::in_software`].
    Software,
}

/// First of the named models that has it; `HOST`: only `host` and `max`, if the host has it; `MACHINE`: none but as
/// [`CpuModel::in_software`] offers it.
const HOST: u8 = 8;
const MACHINE: u8 = 9;

struct Row(&'static str, &'static [F], u32, u32, Reg, u32, By, u8);

/// Every feature bit that is ever offered: all others read as zero, and their instructions are #UD.
#[rustfmt::skip] // one feature a line
const ROWS: &[Row] = &[
    //  name               instructions                     leaf      sub reg bit by     level
    Row("fpu",             &[],                             1,          0, Edx,  0, By::Host, 1),
    Row("vme",             &[],                             1,          0, Edx,  1, By::Us, 1),
    Row("de",              &[],                             1,          0, Edx,  2, By::Us, 1),
    Row("pse",             &[],                             1,          0, Edx,  3, By::Us, 1),
    Row("tsc",             &[],                             1,          0, Edx,  4, By::Us, 1),
    Row("msr",             &[],                             1,          0, Edx,  5, By::Us, 1),
    Row("pae",             &[],                             1,          0, Edx,  6, By::Us, 1),
    Row("mce",             &[],                             1,          0, Edx,  7, By::Us, 1),
    Row("cx8",             &[],                             1,          0, Edx,  8, By::Host, 1),
    Row("apic",            &[],                             1,          0, Edx,  9, By::Us, 1),
    Row("sep",             &[],                             1,          0, Edx, 11, By::Us, 1),
    Row("mtrr",            &[],                             1,          0, Edx, 12, By::Us, 1),
    Row("pge",             &[],                             1,          0, Edx, 13, By::Us, 1),
    Row("mca",             &[],                             1,          0, Edx, 14, By::Us, 1),
    Row("cmov",            &[],                             1,          0, Edx, 15, By::Host, 1),
    Row("pat",             &[],                             1,          0, Edx, 16, By::Us, 1),
    Row("pse36",           &[],                             1,          0, Edx, 17, By::Us, 1),
    Row("clflush",         &[],                             1,          0, Edx, 19, By::Host, 1),
    Row("mmx",             &[],                             1,          0, Edx, 23, By::Host, 1),
    Row("fxsr",            &[],                             1,          0, Edx, 24, By::Host, 1),
    Row("sse",             &[],                             1,          0, Edx, 25, By::Host, 1),
    Row("sse2",            &[],                             1,          0, Edx, 26, By::Host, 1),
    Row("syscall",         &[],                    0x8000_0001,         0, Edx, 11, By::Us, 1),
    Row("nx",              &[],                    0x8000_0001,         0, Edx, 20, By::Us, 1),
    Row("lm",              &[],                    0x8000_0001,         0, Edx, 29, By::Us, 1),
    Row("pni",             &[F::SSE3],                      1,          0, Ecx,  0, By::Host, 2),
    Row("ssse3",           &[F::SSSE3],                     1,          0, Ecx,  9, By::Host, 2),
    Row("cx16",            &[F::CMPXCHG16B],                1,          0, Ecx, 13, By::Host, 2),
    Row("sse4_1",          &[F::SSE4_1],                    1,          0, Ecx, 19, By::Host, 2),
    Row("sse4_2",          &[F::SSE4_2],                    1,          0, Ecx, 20, By::Host, 2),
    Row("popcnt",          &[F::POPCNT],                    1,          0, Ecx, 23, By::Host, 2),
    Row("lahf_lm",         &[],                    0x8000_0001,         0, Ecx,  0, By::Host, 2),
    Row("fma",             &[F::FMA],                       1,          0, Ecx, 12, By::Avx, 3),
    Row("movbe",           &[F::MOVBE],                     1,          0, Ecx, 22, By::Host, 3),
    Row("xsave",           &[F::XSAVE],                     1,          0, Ecx, 26, By::Avx, 3),
    Row("avx",             &[F::AVX],                       1,          0, Ecx, 28, By::Avx, 3),
    Row("f16c",            &[F::F16C],                      1,          0, Ecx, 29, By::Avx, 3),
    Row("bmi1",            &[F::BMI1],                      7,          0, Ebx,  3, By::Host, 3),
    Row("avx2",            &[F::AVX2],                      7,          0, Ebx,  5, By::Avx, 3),
    Row("bmi2",            &[F::BMI2],                      7,          0, Ebx,  8, By::Host, 3),
    Row("abm",             &[F::LZCNT],            0x8000_0001,         0, Ecx,  5, By::Host, 3),
    Row("avx512f",         &[F::AVX512F],                   7,          0, Ebx, 16, By::Avx512, 4),
    Row("avx512dq",        &[F::AVX512DQ],                  7,          0, Ebx, 17, By::Avx512, 4),
    Row("avx512cd",        &[F::AVX512CD],                  7,          0, Ebx, 28, By::Avx512, 4),
    Row("avx512bw",        &[F::AVX512BW],                  7,          0, Ebx, 30, By::Avx512, 4),
    Row("avx512vl",        &[F::AVX512VL],                  7,          0, Ebx, 31, By::Avx512, 4),
    // System features of our own.
    Row("pcid",            &[],                             1,          0, Ecx, 17, By::Us, 3),
    Row("fsgsbase",        &[F::FSGSBASE],                  7,          0, Ebx,  0, By::Us, 3),
    Row("smep",            &[],                             7,          0, Ebx,  7, By::Us, 3),
    Row("invpcid",         &[F::INVPCID],                   7,          0, Ebx, 10, By::Us, 3),
    Row("smap",            &[F::SMAP],                      7,          0, Ebx, 20, By::Us, 3),
    Row("umip",            &[],                             7,          0, Ecx,  2, By::Us, 3),
    Row("tsc_adjust",      &[],                             7,          0, Ebx,  1, By::Us, 3),
    Row("rdpid",           &[F::RDPID],                     7,          0, Ecx, 22, By::Us, 3),
    Row("pdpe1gb",         &[],                    0x8000_0001,         0, Edx, 26, By::Us, 3),
    Row("rdtscp",          &[F::RDTSCP],           0x8000_0001,         0, Edx, 27, By::Us, 2),
    Row("rdrand",          &[F::RDRAND],                    1,          0, Ecx, 30, By::Us, 3),
    Row("rdseed",          &[F::RDSEED],                    7,          0, Ebx, 18, By::Us, HOST),
    // What only the host model takes over.
    Row("pclmulqdq",       &[F::PCLMULQDQ],                 1,          0, Ecx,  1, By::Host, HOST),
    Row("aes",             &[F::AES],                       1,          0, Ecx, 25, By::Host, HOST),
    Row("erms",            &[],                             7,          0, Ebx,  9, By::Host, HOST),
    Row("adx",             &[F::ADX],                       7,          0, Ebx, 19, By::Host, HOST),
    Row("avx512ifma",      &[F::AVX512_IFMA],               7,          0, Ebx, 21, By::Avx512, HOST),
    Row("clflushopt",      &[F::CLFLUSHOPT],                7,          0, Ebx, 23, By::Host, HOST),
    Row("clwb",            &[F::CLWB],                      7,          0, Ebx, 24, By::Host, HOST),
    Row("sha_ni",          &[F::SHA],                       7,          0, Ebx, 29, By::Host, HOST),
    Row("fdp_excptn_only", &[],                             7,          0, Ebx,  6, By::Host, HOST),
    Row("zero_fcs_fds",    &[],                             7,          0, Ebx, 13, By::Host, HOST),
    Row("avx512vbmi",      &[F::AVX512_VBMI],               7,          0, Ecx,  1, By::Avx512, HOST),
    Row("avx512_vbmi2",    &[F::AVX512_VBMI2],              7,          0, Ecx,  6, By::Avx512, HOST),
    Row("gfni",            &[F::GFNI],                      7,          0, Ecx,  8, By::Host, HOST),
    Row("vaes",            &[F::VAES],                      7,          0, Ecx,  9, By::Avx, HOST),
    Row("vpclmulqdq",      &[F::VPCLMULQDQ],                7,          0, Ecx, 10, By::Avx, HOST),
    Row("avx512_vnni",     &[F::AVX512_VNNI],               7,          0, Ecx, 11, By::Avx512, HOST),
    Row("avx512_bitalg",   &[F::AVX512_BITALG],             7,          0, Ecx, 12, By::Avx512, HOST),
    Row("avx512_vpopcntdq",&[F::AVX512_VPOPCNTDQ],          7,          0, Ecx, 14, By::Avx512, HOST),
    Row("fsrm",            &[],                             7,          0, Edx,  4, By::Host, HOST),
    Row("avx512_fp16",     &[F::AVX512_FP16],               7,          0, Edx, 23, By::Avx512, HOST),
    Row("arch_capabilities",&[],                            7,          0, Edx, 29, By::Software, MACHINE),
    Row("sha512",          &[F::SHA512],                    7,          1, Eax,  0, By::Avx, HOST),
    Row("sm3",             &[F::SM3],                       7,          1, Eax,  1, By::Avx, HOST),
    Row("sm4",             &[F::SM4],                       7,          1, Eax,  2, By::Avx, HOST),
    Row("avx_vnni",        &[F::AVX_VNNI],                  7,          1, Eax,  4, By::Avx, HOST),
    Row("avx512_bf16",     &[F::AVX512_BF16],               7,          1, Eax,  5, By::Avx512, HOST),
    Row("avx_ifma",        &[F::AVX_IFMA],                  7,          1, Eax, 23, By::Avx, HOST),
    Row("avx_vnni_int8",   &[F::AVX_VNNI_INT8],             7,          1, Edx,  4, By::Avx, HOST),
    Row("avx_ne_convert",  &[F::AVX_NE_CONVERT],            7,          1, Edx,  5, By::Avx, HOST),
    Row("avx_vnni_int16",  &[F::AVX_VNNI_INT16],            7,          1, Edx, 10, By::Avx, HOST),
    Row("xsaveopt",        &[F::XSAVEOPT],                0xd,          1, Eax,  0, By::Avx, HOST),
    Row("xsavec",          &[F::XSAVEC],                  0xd,          1, Eax,  1, By::Avx, HOST),
    Row("xgetbv1",         &[],                           0xd,          1, Eax,  2, By::Avx, HOST),
    // AltMovCr8: LOCK MOV of CR0 is MOV of CR8, which no bit takes from a host that has it (AMD64 APM 3 MOV CRn).
    Row("cr8_legacy",      &[],                    0x8000_0001,         0, Ecx,  4, By::Host, HOST),
    Row("sse4a",           &[F::SSE4A],            0x8000_0001,         0, Ecx,  6, By::Host, HOST),
    Row("misalignsse",     &[],                    0x8000_0001,         0, Ecx,  7, By::Host, HOST),
    Row("3dnowprefetch",   &[],                    0x8000_0001,         0, Ecx,  8, By::Host, HOST),
    Row("topoext",         &[],                    0x8000_0001,         0, Ecx, 22, By::Host, HOST),
    Row("mmxext",          &[],                    0x8000_0001,         0, Edx, 22, By::Host, HOST),
    Row("fxsr_opt",        &[],                    0x8000_0001,         0, Edx, 25, By::Host, HOST),
    Row("constant_tsc",    &[],                    0x8000_0007,         0, Edx,  8, By::Host, HOST),
    Row("xsaveerptr",      &[],                    0x8000_0008,         0, Ebx,  2, By::Host, HOST),
    Row("lfence_rdtsc",    &[],                    0x8000_0021,         0, Eax,  2, By::Host, HOST),
    Row("null_sel_clr_base",&[],                   0x8000_0021,         0, Eax,  6, By::Host, HOST),
    Row("srso_no",         &[],                    0x8000_0021,         0, Eax, 29, By::Software, HOST),
    Row("x2apic",          &[],                             1,          0, Ecx, 21, By::Us, HOST),
    Row("tsc_deadline_timer",&[],                           1,          0, Ecx, 24, By::Us, HOST),
    Row("arat",            &[],                             6,          0, Eax,  2, By::Us, HOST),
];

/// Instructions every x86-64 CPU has, and those that older CPUs run as something else, without a fault: reserved NOPs (ENDBR, RDSSP,
/// CLDEMOTE, prefetches), LZCNT and TZCNT as BSR and BSF, WBNOINVD as WBINVD.
#[rustfmt::skip]
const ALWAYS: &[F] = &[
    F::INTEL8086, F::INTEL186, F::INTEL286, F::INTEL386, F::INTEL486, F::X64, F::FPU, F::FPU287, F::FPU387, F::CMOV, F::CPUID,
    F::CX8, F::MSR, F::TSC, F::SEP, F::MMX, F::FXSR, F::SSE, F::SSE2, F::SYSCALL, F::CLFSH, F::MULTIBYTENOP, F::PAUSE, F::RDPMC,
    F::PREFETCHW, F::PREFETCHWT1, F::PREFETCHITI, F::CLDEMOTE, F::CET_IBT, F::WBNOINVD,
];

/// A CPU that can be offered to a guest.
#[derive(Clone, Debug)]
pub struct CpuModel {
    name: String,
    /// Leaf and subleaf to EAX, EBX, ECX, EDX; without what depends on the state.
    leaves: BTreeMap<(u32, u32), [u32; 4]>,
    features: Vec<F>,
    /// Of the rows offered.
    names: Vec<&'static str>,
    /// A bit for each [`Code`].
    codes: Box<[u64]>,
    xcr0: u64,
    intel: bool,
}

impl CpuModel {
    /// The names that [`CpuModel::from_name`] takes.
    pub const NAMES: [&'static str; 6] = ["host", "max", "x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"];

    /// Differs between models that offer something different.
    pub fn fingerprint(&self) -> u64 {
        // FNV-1a.
        let add = |h: u64, v: &u32| (h ^ u64::from(*v)).wrapping_mul(0x100_0000_01b3);
        let leaves = self.leaves.iter().flat_map(|((leaf, sub), registers)| [leaf, sub].into_iter().chain(registers));
        leaves.fold(0xcbf2_9ce4_8422_2325, add)
    }

    /// What the host has and we support.
    pub fn host() -> CpuModel {
        // Each CPUID may be an exit to a hypervisor below us.
        static MODEL: OnceLock<CpuModel> = OnceLock::new();
        MODEL.get_or_init(|| CpuModel::build("host", HOST, |_, in_host| in_host)).clone()
    }

    /// As the interpreter and the translator offer it to a machine. A guest's RET is no RET of the host's, so nothing in a guest can make the
    /// host's return stack mispredict one (SRSO; AMD64 APM 3 appendix E.4.15), and kernels need no detour for each. And rights of the
    /// guest's pages are looked at before an access is made, or the page is not mapped on the host at all: no load of user code runs
    /// ahead of the host's check of U/S, which RDCL_NO in IA32_ARCH_CAPABILITIES says (SDM 4), and kernels need no page tables of their
    /// own, with a write of CR3 on each way in and out.
    #[must_use]
    pub fn in_software(self) -> CpuModel {
        let own = |r: &&Row| (r.2 < 0x8000_0000) == self.intel && !self.name.contains(r.0);
        let more: Vec<_> = ROWS.iter().filter(|r| r.6 == By::Software && own(r)).map(|r| r.0).collect();
        if more.is_empty() {
            return self;
        }
        CpuModel::build(&self.name, u8::MAX, |row, _| self.names.contains(&row.0) || more.contains(&row.0))
    }

    /// What the host has and we support, and what we can do without the host.
    pub fn max() -> CpuModel {
        CpuModel::build("max", HOST, |row, in_host| in_host || row.6 == By::Us)
    }

    /// One of the levels of the x86-64 psABI, 1 to 4.
    ///
    /// # Errors
    /// A sentence that names what the host lacks.
    pub fn level(level: u8) -> Result<CpuModel, String> {
        let host = Host::probe();
        let missing: Vec<&str> =
            ROWS.iter().filter(|r| r.7 <= level && r.6 != By::Us && !host.has(r)).map(|r| r.0).collect();
        if missing.is_empty() {
            Ok(CpuModel::build(&format!("x86-64-v{level}"), level, |_, _| true))
        } else {
            Err(format!(
                "this host cannot offer x86-64-v{level}: it lacks {} (SIMD runs on the host's own units)",
                missing.join(", ")
            ))
        }
    }

    /// `host`, `max` or `x86-64-v1` to `x86-64-v4`, and after it features more or less, named as Linux does: `max,-pcid,+rdseed`.
    ///
    /// # Errors
    /// A sentence: no such model or feature, or what the host lacks for it.
    pub fn from_name(name: &str) -> Result<CpuModel, String> {
        let (base, changes) = name.split_once(',').unwrap_or((name, ""));
        let model = match base {
            "host" => CpuModel::host(),
            "max" => CpuModel::max(),
            "x86-64" | "x86-64-v1" => CpuModel::level(1)?,
            "x86-64-v2" => CpuModel::level(2)?,
            "x86-64-v3" => CpuModel::level(3)?,
            "x86-64-v4" => CpuModel::level(4)?,
            _ => return Err(format!("no CPU model is called {base}: there are {}", CpuModel::NAMES.join(", "))),
        };
        if changes.is_empty() { Ok(model) } else { model.changed(name, changes) }
    }

    /// The model with features more or less.
    fn changed(&self, name: &str, changes: &str) -> Result<CpuModel, String> {
        let host = Host::probe();
        let mut names = self.names.clone();
        for change in changes.split(',') {
            let sign_and_feature = change.strip_prefix('+').map(|f| (true, f));
            let Some((more, feature)) = sign_and_feature.or_else(|| change.strip_prefix('-').map(|f| (false, f)))
            else {
                return Err(format!("`{change}` in the CPU `{name}` is neither +feature nor -feature"));
            };
            let Some(row) = ROWS.iter().find(|r| r.0 == feature) else {
                return Err(format!("no feature is called {feature}: the names are those of /proc/cpuinfo"));
            };
            names.retain(|n| *n != feature);
            if more && row.6 != By::Us && !host.has(row) {
                return Err(format!("this host cannot offer {feature}: it lacks it"));
            } else if more {
                names.push(row.0);
            }
        }
        Ok(CpuModel::build(name, u8::MAX, |row, _| names.contains(&row.0)))
    }

    fn build(name: &str, level: u8, want: impl Fn(&Row, bool) -> bool) -> CpuModel {
        let host = Host::probe();
        let rows: Vec<&Row> = ROWS.iter().filter(|r| r.7 <= level && want(r, host.has(r))).collect();
        let features: Vec<F> = ALWAYS.iter().copied().chain(rows.iter().flat_map(|r| r.1.iter().copied())).collect();
        let mut xcr0 = component::X87 | component::SSE;
        if features.contains(&F::AVX) {
            xcr0 |= component::AVX;
        }
        if features.contains(&F::AVX512F) {
            xcr0 |= component::AVX512;
        }
        xcr0 &= Layout::host().components;
        let mut model = CpuModel {
            name: name.to_owned(),
            leaves: BTreeMap::new(),
            codes: codes(&features),
            xcr0: if features.contains(&F::XSAVE) { xcr0 } else { component::X87 | component::SSE },
            features,
            names: rows.iter().map(|r| r.0).collect(),
            intel: host.vendor_is(b"GenuineIntel") || host.vendor_is(b"CentaurHauls"),
        };
        model.fill(&host);
        for r in rows {
            let leaf = model.leaves.entry((r.2, r.3)).or_default();
            leaf[r.4 as usize] |= 1 << r.5;
        }
        model
    }

    /// The leaves apart from feature bits.
    fn fill(&mut self, host: &Host) {
        let mut set = |leaf: u32, sub: u32, v: [u32; 4]| {
            self.leaves.insert((leaf, sub), v);
        };
        let [_, b, c, d] = host.get(0, 0);
        set(0, 0, [0xd, b, c, d]);
        // One logical processor with APIC ID 0, CLFLUSH lines of 64 bytes; bit 31 of ECX: there is a hypervisor.
        set(1, 0, [host.get(1, 0)[0], 0x0001_0800, 1 << 31, 0]);
        set(6, 0, [0; 4]);
        set(7, 0, [1, 0, 0, 0]);
        set(7, 1, [0; 4]);
        if self.intel {
            set(2, 0, host.get(2, 0));
            for sub in 0..8 {
                let mut v = host.get(4, sub);
                if v[0] & 0x1f == 0 {
                    break;
                }
                v[0] &= 0x3fff; // caches are shared by one logical processor of one core
                set(4, sub, v);
            }
        }
        set(0xb, 0, [0, 1, 0x100, 0]);
        set(0xb, 1, [0, 1, 0x201, 0]);
        if self.features.contains(&F::XSAVE) {
            let l = Layout::host();
            set(0xd, 0, [self.xcr0 as u32, 0, size_for(self.xcr0), 0]);
            set(0xd, 1, [0; 4]);
            let parts = [(2, component::AVX, l.avx, 256), (5, component::OPMASK, l.opmask, 64)];
            let more = [(6, component::ZMM_HI256, l.zmm_hi256, 512), (7, component::HI16_ZMM, l.hi16_zmm, 1024)];
            for (sub, bit, offset, size) in parts.into_iter().chain(more) {
                if self.xcr0 & bit != 0 {
                    set(0xd, sub, [size, offset as u32, host.get(0xd, sub)[2] & 2, 0]);
                }
            }
        }
        let word = |s: &[u8]| u32::from_le_bytes(s.try_into().expect("four bytes"));
        let name = b"BivisorVMM  ";
        set(0x4000_0000, 0, [0x4000_0000, word(&name[..4]), word(&name[4..8]), word(&name[8..])]);

        set(0x8000_0000, 0, [0x8000_0008, b, c, d]);
        let signature = if self.intel { 0 } else { host.get(0x8000_0001, 0)[0] };
        // AMD repeats the low bits of leaf 1 EDX.
        set(0x8000_0001, 0, [signature, 0, 0, 0]);
        for leaf in 0x8000_0002..=0x8000_0006 {
            set(leaf, 0, host.get(leaf, 0));
        }
        set(0x8000_0007, 0, [0; 4]);
        set(0x8000_0008, 0, [LINEAR_BITS << 8 | PHYSICAL_BITS, 0, 0, 0]);
        if !self.intel {
            set(0x8000_0000, 0, [0x8000_0021, b, c, d]);
            set(0x8000_001a, 0, host.get(0x8000_001a, 0));
            for sub in 0..8 {
                let mut v = host.get(0x8000_001d, sub);
                if v[0] & 0x1f == 0 {
                    break;
                }
                v[0] &= 0x3fff;
                set(0x8000_001d, sub, v);
            }
            set(0x8000_001e, 0, [0; 4]);
            set(0x8000_0021, 0, [0; 4]);
        }
        if host.brand().iter().all(|&b| b == 0) {
            self.leaves.retain(|&(leaf, _), _| !(0x8000_0002..=0x8000_0004).contains(&leaf));
        }
    }

    /// The name it was asked for by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Intel's rules where the vendors differ; else AMD's.
    pub fn is_intel(&self) -> bool {
        self.intel
    }

    /// Does it have the feature?
    pub fn has(&self, feature: F) -> bool {
        self.features.contains(&feature)
    }

    /// Is the feature offered that Linux calls so in /proc/cpuinfo?
    pub fn offers(&self, name: &str) -> bool {
        self.names.contains(&name)
    }

    /// Does the instruction exist? If not, it is #UD.
    #[inline]
    pub fn supports(&self, code: Code) -> bool {
        self.codes[code as usize / 64] >> (code as usize % 64) & 1 != 0
    }

    /// The bits that XCR0 may have; XSETBV of others gives #GP(0).
    pub fn xcr0(&self) -> u64 {
        self.xcr0
    }

    /// The bits that CR4 may have; others are reserved.
    pub fn cr4(&self) -> Cr4 {
        let bit = |leaf: u32, reg: Reg, bit: u32| self.leaf(leaf, 0)[reg as usize] >> bit & 1 != 0;
        let mut cr4 = Cr4::VME | Cr4::PVI | Cr4::TSD | Cr4::DE | Cr4::PSE | Cr4::PAE | Cr4::MCE | Cr4::PGE | Cr4::PCE;
        cr4 |= Cr4::OSFXSR | Cr4::OSXMMEXCPT;
        cr4.set(Cr4::PCIDE, bit(1, Ecx, 17));
        cr4.set(Cr4::OSXSAVE, bit(1, Ecx, 26));
        cr4.set(Cr4::FSGSBASE, bit(7, Ebx, 0));
        cr4.set(Cr4::SMEP, bit(7, Ebx, 7));
        cr4.set(Cr4::SMAP, bit(7, Ebx, 20));
        cr4.set(Cr4::UMIP, bit(7, Ecx, 2));
        cr4
    }

    fn leaf(&self, leaf: u32, sub: u32) -> [u32; 4] {
        self.leaves.get(&(leaf, sub)).copied().unwrap_or_default()
    }

    /// CPUID: EAX, EBX, ECX, EDX. OSXSAVE follows CR4, the size in leaf 0xD follows XCR0.
    pub fn cpuid(&self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let leaf = self.in_range(leaf);
        let sub = if matches!(leaf, 4 | 7 | 0xb | 0xd | 0x8000_001d) { subleaf } else { 0 };
        let mut v = self.leaf(leaf, sub);
        match (leaf, sub) {
            (1, _) => {
                if cpu.cr4.contains(Cr4::OSXSAVE) {
                    v[2] |= 1 << 27;
                }
                if cpu.msr.apic_base & 1 << 11 == 0 {
                    v[3] &= !(1 << 9);
                }
            }
            // The input ECX is given back in the low byte, also for levels that are not there.
            (0xb, _) => v[2] = v[2] & !0xff | sub & 0xff,
            (0xd, 0) if v[0] != 0 => v[1] = size_for(cpu.xcr0),
            (0xd, 1) if v[0] & 2 != 0 => v[1] = compacted_size(cpu.xcr0),
            // SYSCALL is there in 64-bit mode only on Intel; software asks in any mode, so the bit stands.
            (0x8000_0001, _) if !self.intel => v[3] |= self.leaf(1, 0)[3] & 0x0183_f3ff,
            _ => {}
        }
        v
    }

    /// Leaves past the end: zeros on AMD, the last basic leaf on Intel.
    fn in_range(&self, leaf: u32) -> u32 {
        let known = match leaf {
            0..0x4000_0000 => leaf <= self.leaf(0, 0)[0],
            0x4000_0000..0x4000_0100 => leaf <= self.leaf(0x4000_0000, 0)[0],
            _ => leaf <= self.leaf(0x8000_0000, 0)[0],
        };
        if known || !self.intel { leaf } else { self.leaf(0, 0)[0] }
    }

    /// Every leaf and subleaf with its values, for a backend that must tell them to the hardware; OSXSAVE and the size in leaf
    /// 0xD as they are with everything enabled.
    pub fn leaves(&self) -> Vec<(u32, u32, [u32; 4])> {
        let full = CpuState { xcr0: self.xcr0, ..CpuState::long64(0) };
        self.leaves.keys().map(|&(leaf, sub)| (leaf, sub, self.cpuid(&full, leaf, sub))).collect()
    }
}

impl Default for CpuModel {
    fn default() -> CpuModel {
        CpuModel::host()
    }
}

/// Bytes of an XSAVE image in standard format with these components.
pub fn size_for(xcr0: u64) -> u32 {
    let l = Layout::host();
    let mut size = 576;
    for (bit, end) in [
        (component::AVX, l.avx + 256),
        (component::OPMASK, l.opmask + 64),
        (component::ZMM_HI256, l.zmm_hi256 + 512),
        (component::HI16_ZMM, l.hi16_zmm + 1024),
    ] {
        if xcr0 & bit != 0 {
            size = size.max(end as u32);
        }
    }
    size
}

/// Bytes of an XSAVE image in compacted format with these components. No offered component asks for alignment on a host of ours;
/// [`crate::cpu::cpuid`] would say so in leaf 0xD.
pub fn compacted_size(xcr0: u64) -> u32 {
    let parts =
        [(component::AVX, 256), (component::OPMASK, 64), (component::ZMM_HI256, 512), (component::HI16_ZMM, 1024)];
    576 + parts.iter().filter(|(bit, _)| xcr0 & bit != 0).map(|(_, n)| n).sum::<u32>()
}

/// A code is there if each feature that iced names for it is.
fn codes(features: &[F]) -> Box<[u64]> {
    let mut bits = vec![0u64; Code::values().len().div_ceil(64)];
    // Asked thousands of times at every start.
    let mut there = [false; 256];
    features.iter().for_each(|f| there[*f as usize & 255] = true);
    for code in Code::values() {
        let hint = matches!(code, Code::Rdsspd_r32 | Code::Rdsspq_r64);
        let has = |f: &F| there[*f as usize & 255] || (*f == F::BMI1 && is_tzcnt(code)) || *f == F::LZCNT;
        if code != Code::INVALID && (hint || code.cpuid_features().iter().all(has)) {
            bits[code as usize / 64] |= 1 << (code as usize % 64);
        }
    }
    bits.into_boxed_slice()
}

fn is_tzcnt(code: Code) -> bool {
    matches!(code, Code::Tzcnt_r16_rm16 | Code::Tzcnt_r32_rm32 | Code::Tzcnt_r64_rm64)
}

/// The host's CPUID.
struct Host {
    max: [u32; 2],
}

impl Host {
    fn probe() -> Host {
        let max = [0, 0x8000_0000].map(|leaf| host_cpu::cpuid(leaf, 0)[0]);
        Host { max }
    }

    fn get(&self, leaf: u32, sub: u32) -> [u32; 4] {
        if leaf > self.max[usize::from(leaf >= 0x8000_0000)] {
            return [0; 4];
        }
        host_cpu::cpuid(leaf, sub)
    }

    fn has(&self, row: &Row) -> bool {
        let enabled = match row.6 {
            By::Host | By::Us | By::Software => true,
            By::Avx => Layout::host().components & component::AVX != 0,
            By::Avx512 => Layout::host().components & component::AVX512 == component::AVX512,
        };
        enabled && self.get(row.2, row.3)[row.4 as usize] >> row.5 & 1 != 0
    }

    fn vendor_is(&self, name: &[u8; 12]) -> bool {
        let [_, b, c, d] = self.get(0, 0);
        [b, d, c].iter().flat_map(|r| r.to_le_bytes()).eq(name.iter().copied())
    }

    fn brand(&self) -> Vec<u8> {
        (0x8000_0002..=0x8000_0004).flat_map(|l| self.get(l, 0)).flat_map(u32::to_le_bytes).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_in_software_have_a_return_stack_of_their_own() {
        let model = CpuModel::host().in_software();
        assert_eq!(model.offers("srso_no"), !model.is_intel() || CpuModel::host().offers("srso_no"));
        assert_eq!(model.leaves().len(), CpuModel::host().leaves().len());
        assert_eq!((model.name(), model.xcr0()), ("host", CpuModel::host().xcr0()));
        let without = CpuModel::from_name("host,-srso_no").expect("a feature").in_software();
        assert!(!without.offers("srso_no"), "unless it is asked not to");
    }

    /// SDM 2A CPUID, leaf 7: EDX bit 29, IA32_ARCH_CAPABILITIES.
    #[test]
    fn machines_in_software_need_no_tables_for_the_kernel_alone() {
        let (bare, model) = (CpuModel::host(), CpuModel::host().in_software());
        assert!(!bare.offers("arch_capabilities"), "hardware has to say it of itself");
        assert_eq!(model.offers("arch_capabilities"), model.is_intel());
        assert_eq!(model.leaf(7, 0)[3] >> 29 & 1 != 0, model.is_intel());
        let without = CpuModel::from_name("max,-arch_capabilities").expect("a feature").in_software();
        assert!(!without.offers("arch_capabilities"), "unless it is asked not to");
    }

    #[test]
    fn levels_contain_each_other() {
        for level in 2..=4 {
            let (Ok(low), Ok(high)) = (CpuModel::level(level - 1), CpuModel::level(level)) else { continue };
            for code in Code::values() {
                assert!(!low.supports(code) || high.supports(code), "{code:?} is in v{} only", level - 1);
            }
        }
    }

    #[test]
    fn instructions_follow_the_feature() {
        let v1 = CpuModel::level(1).expect("every x86-64 host has it");
        for code in [Code::Movaps_xmm_xmmm128, Code::Lzcnt_r32_rm32, Code::Endbr64, Code::Fsin, Code::Syscall] {
            assert!(v1.supports(code), "{code:?}");
        }
        for code in [Code::VEX_Vaddps_xmm_xmm_xmmm128, Code::Pshufb_xmm_xmmm128, Code::Vmcall, Code::Rsm, Code::Mwait] {
            assert!(!v1.supports(code), "{code:?}");
        }
    }

    #[test]
    fn xsave_leaf_matches_the_layout() {
        let host = CpuModel::host();
        let mut cpu = CpuState::long64(3);
        if !host.has(F::XSAVE) {
            return;
        }
        assert_eq!(host.cpuid(&cpu, 0xd, 0)[0] as u64, host.xcr0());
        assert_eq!(host.cpuid(&cpu, 0xd, 0)[1], Layout::host().size as u32);
        cpu.xcr0 = 3;
        assert_eq!(host.cpuid(&cpu, 0xd, 0)[1], 576);
        cpu.cr4.remove(Cr4::OSXSAVE);
        assert_eq!(host.cpuid(&cpu, 1, 0)[2] >> 27 & 1, 0);
    }

    /// Nothing is offered to unprivileged code that the host lacks.
    #[test]
    fn host_model_is_within_the_host() {
        let (model, host) = (CpuModel::host(), Host::probe());
        for r in ROWS.iter().filter(|r| r.7 <= HOST) {
            let offered = model.leaf(r.2, r.3)[r.4 as usize] >> r.5 & 1 != 0;
            assert_eq!(offered, host.has(r), "{}", r.0);
        }
    }

    #[test]
    fn names() {
        assert!(CpuModel::from_name("pentium").is_err_and(|e| e.contains("x86-64-v3")));
        assert_eq!(CpuModel::from_name("host").expect("always there").name(), "host");
        let less = CpuModel::from_name("max,-pcid,-smap").expect("known features");
        assert!(CpuModel::max().offers("pcid") && !less.offers("pcid") && less.offers("umip"));
        assert!(!less.cr4().contains(Cr4::PCIDE) && !less.supports(Code::Stac));
        assert!(CpuModel::from_name("max,pcid").is_err_and(|e| e.contains("+feature")));
        assert!(CpuModel::from_name("max,+warp").is_err_and(|e| e.contains("warp")));
    }
}
