//! A request's registers: the presets of each mode, then what the request says.
//!
//! Presets: `real16`: CR0 0x10, segments 16 times the selector with 64 KiB limits, IDTR 0/0x3FF. `prot16`, `prot32`: CR0 PE|NE|ET, no
//! paging, flat 4 GiB segments (D=0 or 1). `compat16`,
//! `compat32`, `long64`: paging and long mode on; CS.L=0 and D=0 or 1, or L=1. All: CPL as asked (default
//! 0), CR4 OSFXSR|OSXMMEXCPT|OSXSAVE (and PAE in long mode), XCR0 all components of the host, FCW 0x37F, MXCSR 0x1F80, RFLAGS 2.

use super::request::{Fpu, ModeName, Request, SegmentValue, System};
use bivisor_emulator::cpu::{
    Attr, CpuState, Cr0, Cr4, Efer, Rflags, Segment, Table, msr::index, state::xsave_components,
};
use bivisor_emulator::isa::{Gpr, Seg};

/// An MSR that requests may set and responses show.
pub struct MsrField {
    pub index: u32,
    pub get: fn(&CpuState) -> u64,
    pub set: fn(&mut CpuState, u64),
}

macro_rules! msr {
    ($index:ident, $($field:tt)+) => {
        MsrField { index: index::$index, get: |s| s.$($field)+, set: |s, v| s.$($field)+ = v }
    };
}

/// The MSRs of [`CpuState`].
pub const MSRS: &[MsrField] = &[
    msr!(SYSENTER_CS, msr.sysenter_cs),
    msr!(SYSENTER_ESP, msr.sysenter_esp),
    msr!(SYSENTER_EIP, msr.sysenter_eip),
    msr!(PAT, msr.pat),
    msr!(APIC_BASE, msr.apic_base),
    msr!(STAR, msr.star),
    msr!(LSTAR, msr.lstar),
    msr!(CSTAR, msr.cstar),
    msr!(FMASK, msr.fmask),
    msr!(KERNEL_GS_BASE, msr.kernel_gs_base),
    msr!(TSC_AUX, msr.tsc_aux),
    msr!(FS_BASE, seg[Seg::Fs as usize].base),
    msr!(GS_BASE, seg[Seg::Gs as usize].base),
    MsrField { index: index::EFER, get: |s| s.efer.bits(), set: |s, v| s.efer = Efer::from_bits_retain(v) },
];

/// The start state of a request; page tables are the world's.
///
/// # Errors
/// A sentence naming the field that makes no sense.
pub fn state(r: &Request) -> Result<CpuState, String> {
    let cpl = r.cpl.unwrap_or(0);
    if cpl > 3 {
        return Err(format!("cpl {cpl}: 0 to 3"));
    }
    let mut s = preset(r.mode, cpl);
    for (name, value) in &r.regs {
        register(&mut s, name, value.0)?;
    }
    for (name, value) in &r.segs {
        let i = Seg::NAMES.iter().position(|n| n == name).ok_or_else(|| format!("segs: no register `{name}`"))?;
        segment(&mut s.seg[i], value, r.mode == ModeName::Real16);
    }
    system(&mut s, &r.sys)?;
    if let Some(f) = &r.fpu {
        fpu(&mut s, f)?;
    }
    for (name, value) in &r.vec {
        vector(&mut s, name, value)?;
    }
    Ok(s)
}

fn preset(mode: ModeName, cpl: u8) -> CpuState {
    let mut s = CpuState::long64(cpl);
    s.rflags = Rflags::FIXED;
    s.idtr = Table { base: 0, limit: 0 };
    s.gdtr = s.idtr;
    let data = Segment::data32(0x18 | u16::from(cpl), cpl);
    let code = 0x10 | u16::from(cpl);
    let long = matches!(mode, ModeName::Compat16 | ModeName::Compat32 | ModeName::Long64);
    if !long {
        s.cr0 = Cr0::PE | Cr0::ET | Cr0::NE | Cr0::MP;
        s.cr4 -= Cr4::PAE;
        s.efer = Efer::empty();
    }
    s.xcr0 = xsave_components();
    s.cr4 -= Cr4::FSGSBASE;
    s.seg = [data; 6];
    s.seg[Seg::Cs as usize] = match mode {
        ModeName::Long64 => Segment::code64(code, cpl),
        _ => Segment::code32(code, cpl),
    };
    match mode {
        ModeName::Real16 => {
            s.cr0 = Cr0::ET;
            s.seg = [Segment::real(0); 6];
            s.seg[Seg::Cs as usize].attr = Attr::from_bits_retain(0x9b);
            s.idtr = Table { base: 0, limit: 0x3ff };
        }
        ModeName::Prot16 | ModeName::Compat16 => {
            for seg in &mut s.seg {
                seg.attr -= Attr::DB;
            }
        }
        _ => {}
    }
    s
}

fn register(s: &mut CpuState, name: &str, v: u64) -> Result<(), String> {
    match name {
        "rip" | "eip" | "ip" => s.rip = v,
        "rflags" | "eflags" | "flags" => s.rflags = Rflags::from_bits_retain(v | 2),
        _ => {
            let i = Gpr::NAMES.iter().position(|n| {
                // eax and ax are taken for rax: the request says the whole register.
                *n == name || name.strip_prefix('e').is_some_and(|rest| n.strip_prefix('r') == Some(rest))
            });
            s.gpr[i.ok_or_else(|| format!("regs: no register `{name}`"))?] = v;
        }
    }
    Ok(())
}

fn segment(seg: &mut Segment, v: &SegmentValue, real: bool) {
    match v {
        SegmentValue::Selector(sel) => {
            seg.selector = sel.0 as u16;
            if real {
                seg.base = u64::from(seg.selector) << 4;
            }
        }
        SegmentValue::Whole { sel, base, limit, attr } => {
            segment(seg, &SegmentValue::Selector(*sel), real);
            seg.base = base.map_or(seg.base, |b| b.0);
            seg.limit = limit.map_or(seg.limit, |l| l.0 as u32);
            seg.attr = attr.map_or(seg.attr, |a| Attr::from_bits_retain(a.0 as u32));
        }
    }
}

fn system(s: &mut CpuState, y: &System) -> Result<(), String> {
    let set = |slot: &mut u64, v: &Option<super::number::Num>| {
        if let Some(v) = v {
            *slot = v.0;
        }
    };
    if let Some(v) = y.cr0 {
        s.cr0 = Cr0::from_bits_retain(v.0);
    }
    if let Some(v) = y.cr4 {
        s.cr4 = Cr4::from_bits_retain(v.0);
    }
    if let Some(v) = y.efer {
        s.efer = Efer::from_bits_retain(v.0);
    }
    set(&mut s.cr2, &y.cr2);
    set(&mut s.cr3, &y.cr3);
    set(&mut s.cr8, &y.cr8);
    set(&mut s.xcr0, &y.xcr0);
    for (i, v) in [&y.dr0, &y.dr1, &y.dr2, &y.dr3].into_iter().enumerate() {
        set(&mut s.dr[i], v);
    }
    set(&mut s.dr6, &y.dr6);
    set(&mut s.dr7, &y.dr7);
    for (table, v) in [(&mut s.gdtr, &y.gdtr), (&mut s.idtr, &y.idtr)] {
        if let Some(v) = v {
            *table = Table { base: v.base.0, limit: v.limit.0 as u16 };
        }
    }
    for (seg, v) in [(&mut s.ldtr, &y.ldtr), (&mut s.tr, &y.tr)] {
        if let Some(v) = v {
            segment(seg, v, false);
        }
    }
    for (name, v) in &y.msrs {
        let hex = name.strip_prefix("0x").unwrap_or(name);
        let index = u32::from_str_radix(hex, 16).map_err(|_| format!("msrs: `{name}` is no number"))?;
        let field = MSRS.iter().find(|m| m.index == index).ok_or_else(|| format!("msrs: {name} is not kept"))?;
        (field.set)(s, v.0);
    }
    Ok(())
}

fn fpu(s: &mut CpuState, f: &Fpu) -> Result<(), String> {
    let x = &mut s.xsave;
    if f.st.len() > 8 {
        return Err("fpu.st: at most 8 registers".into());
    }
    for (i, v) in f.st.iter().enumerate() {
        x.set_st(i, v.bytes().ok_or("fpu.st: 80 bits each")?);
    }
    if let Some(v) = f.fcw {
        x.set_fcw(v.0 as u16);
    }
    if let Some(v) = f.fsw {
        x.set_fsw(v.0 as u16);
    }
    if let Some(v) = f.ftw_abridged {
        x.set_ftw_abridged(v.0 as u8);
    }
    if let Some(v) = f.fop {
        x.set_fop(v.0 as u16);
    }
    if let Some(v) = f.fip {
        x.set_fip(v.0);
    }
    if let Some(v) = f.fdp {
        x.set_fdp(v.0);
    }
    if let Some(v) = f.mxcsr {
        x.set_mxcsr(v.0 as u32);
    }
    Ok(())
}

fn vector(s: &mut CpuState, name: &str, v: &super::number::Wide) -> Result<(), String> {
    let bad = || format!("vec: no register `{name}`");
    let digits = name.find(|c: char| c.is_ascii_digit()).ok_or_else(bad)?;
    let (kind, number) = name.split_at(digits);
    let number: usize = number.parse().map_err(|_| bad())?;
    let too_wide = || format!("vec: {name}: too many bits");
    match kind {
        "k" if number < 8 => s.xsave.set_opmask(number, u64::from_le_bytes(v.bytes().ok_or_else(too_wide)?)),
        "xmm" | "ymm" | "zmm" if number < 32 => {
            let mut whole = s.xsave.zmm(number);
            let len = match kind {
                "xmm" => 16,
                "ymm" => 32,
                _ => 64,
            };
            let value: [u8; 64] = v.bytes().ok_or_else(too_wide)?;
            if value[len..].iter().any(|b| *b != 0) {
                return Err(too_wide());
            }
            whole[..len].copy_from_slice(&value[..len]);
            s.xsave.set_zmm(number, whole);
        }
        _ => return Err(bad()),
    }
    Ok(())
}
