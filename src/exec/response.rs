//! The outcome of a case, as JSON.

use super::number::{Hex, Num, Wide};
use bivisor_emulator::cpu::{CpuState, Segment, Table, xsave::component};
use bivisor_emulator::isa::{Gpr, Seg};
use serde::Serialize;
use std::collections::BTreeMap;

/// One line of output.
#[derive(Debug, Serialize)]
pub struct Response {
    pub id: serde_json::Value,
    pub stop: Stop,
    pub insns: u64,
    /// Why, for `unsupported`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exception: Option<Exception>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regs: Option<BTreeMap<&'static str, Num>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub segs: Option<BTreeMap<&'static str, SegmentOut>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sys: Option<SystemOut>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fpu: Option<FpuOut>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vec: Option<BTreeMap<String, Wide>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memdelta: Option<Vec<Bytes>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mem: Option<Vec<Bytes>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub io: Option<Vec<IoOut>>,
}

impl Response {
    /// Without any state.
    pub fn bare(id: serde_json::Value, stop: Stop, reason: Option<String>) -> Response {
        Response {
            id,
            stop,
            insns: 0,
            reason,
            exception: None,
            regs: None,
            segs: None,
            sys: None,
            fpu: None,
            vec: None,
            memdelta: None,
            mem: None,
            io: None,
        }
    }
}

/// Why the run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stop {
    Insns,
    Hlt,
    Rip,
    Exception,
    Limit,
    TripleFault,
    Unsupported,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Exception {
    pub vector: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<Num>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cr2: Option<Num>,
}

#[derive(Debug, Serialize)]
pub struct SegmentOut {
    pub sel: Num,
    pub base: Num,
    pub limit: Num,
    pub attr: Num,
}

impl From<&Segment> for SegmentOut {
    fn from(s: &Segment) -> SegmentOut {
        SegmentOut {
            sel: Num(s.selector.into()),
            base: Num(s.base),
            limit: Num(s.limit.into()),
            attr: Num(s.attr.bits().into()),
        }
    }
}

#[derive(Debug, Serialize)]
pub struct TableOut {
    pub base: Num,
    pub limit: Num,
}

impl From<&Table> for TableOut {
    fn from(t: &Table) -> TableOut {
        TableOut { base: Num(t.base), limit: Num(t.limit.into()) }
    }
}

#[derive(Debug, Serialize)]
pub struct SystemOut {
    cr0: Num,
    cr2: Num,
    cr3: Num,
    cr4: Num,
    cr8: Num,
    efer: Num,
    xcr0: Num,
    gdtr: TableOut,
    idtr: TableOut,
    ldtr: SegmentOut,
    tr: SegmentOut,
    dr0: Num,
    dr1: Num,
    dr2: Num,
    dr3: Num,
    dr6: Num,
    dr7: Num,
    msrs: BTreeMap<String, Num>,
}

#[derive(Debug, Serialize)]
pub struct FpuOut {
    fcw: Num,
    fsw: Num,
    ftw_abridged: Num,
    fop: Num,
    fip: Num,
    fdp: Num,
    st: Vec<Wide>,
    mxcsr: Num,
}

#[derive(Debug, Serialize)]
pub struct Bytes {
    pub addr: Num,
    pub hex: Hex,
}

#[derive(Clone, Debug, Serialize)]
pub struct IoOut {
    pub dir: &'static str,
    pub port: u16,
    pub size: usize,
    pub val: Num,
}

/// General-purpose registers, RIP, RFLAGS.
pub fn regs(s: &CpuState) -> BTreeMap<&'static str, Num> {
    let gprs = Gpr::ALL.iter().map(|r| (r.name(), Num(s.gpr[*r as usize])));
    gprs.chain([("rip", Num(s.rip)), ("rflags", Num(s.rflags.bits()))]).collect()
}

/// Segment registers with hidden parts.
pub fn segs(s: &CpuState) -> BTreeMap<&'static str, SegmentOut> {
    Seg::ALL.iter().map(|r| (Seg::NAMES[*r as usize], s.segment(*r).into())).collect()
}

/// Control, debug, table and model-specific registers.
pub fn sys(s: &CpuState) -> SystemOut {
    SystemOut {
        cr0: Num(s.cr0.bits()),
        cr2: Num(s.cr2),
        cr3: Num(s.cr3),
        cr4: Num(s.cr4.bits()),
        cr8: Num(s.cr8),
        efer: Num(s.efer.bits()),
        xcr0: Num(s.xcr0),
        gdtr: (&s.gdtr).into(),
        idtr: (&s.idtr).into(),
        ldtr: (&s.ldtr).into(),
        tr: (&s.tr).into(),
        dr0: Num(s.dr[0]),
        dr1: Num(s.dr[1]),
        dr2: Num(s.dr[2]),
        dr3: Num(s.dr[3]),
        dr6: Num(s.dr6),
        dr7: Num(s.dr7),
        msrs: super::setup::MSRS.iter().map(|m| (format!("{:#x}", m.index), Num((m.get)(s)))).collect(),
    }
}

/// x87 state and MXCSR.
pub fn fpu(s: &CpuState) -> FpuOut {
    let x = &s.xsave;
    FpuOut {
        fcw: Num(x.fcw().into()),
        fsw: Num(x.fsw().into()),
        ftw_abridged: Num(x.ftw_abridged().into()),
        fop: Num(x.fop().into()),
        fip: Num(x.fip()),
        fdp: Num(x.fdp()),
        st: (0..8).map(|i| Wide(x.st(i).to_vec())).collect(),
        mxcsr: Num(x.mxcsr().into()),
    }
}

/// Vector and opmask registers, at the width that XCR0 enables.
pub fn vec(s: &CpuState) -> BTreeMap<String, Wide> {
    let (name, count, bytes) = if s.xcr0 & component::AVX512 == component::AVX512 {
        ("zmm", 32, 64)
    } else if s.xcr0 & component::AVX != 0 {
        ("ymm", 16, 32)
    } else {
        ("xmm", 16, 16)
    };
    let mut out: BTreeMap<_, _> =
        (0..count).map(|i| (format!("{name}{i}"), Wide(s.xsave.zmm(i)[..bytes].to_vec()))).collect();
    if name == "zmm" {
        out.extend((0..8).map(|i| (format!("k{i}"), Wide(s.xsave.opmask(i).to_le_bytes().to_vec()))));
    }
    out
}
