//! One case, as JSON: the state to start from, when to stop, what to tell.

use super::number::{Hex, Num, Wide};
use bivisor_emulator::mem::Prot;
use serde::Deserialize;
use std::collections::BTreeMap;

/// One line of input.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    /// Given back in the response.
    #[serde(default)]
    pub id: serde_json::Value,
    #[serde(default)]
    pub mode: ModeName,
    #[serde(default)]
    pub cpu: Option<String>,
    #[serde(default)]
    pub cpl: Option<u8>,
    #[serde(default)]
    pub regs: BTreeMap<String, Num>,
    #[serde(default)]
    pub segs: BTreeMap<String, SegmentValue>,
    #[serde(default)]
    pub sys: System,
    #[serde(default)]
    pub fpu: Option<Fpu>,
    #[serde(default)]
    pub vec: BTreeMap<String, Wide>,
    #[serde(default)]
    pub mem: Vec<Memory>,
    /// An ELF file: its PT_LOAD segments are memory, RIP its entry unless given.
    #[serde(default)]
    pub elf: Option<String>,
    #[serde(default)]
    pub ram_fill: Option<Hex>,
    #[serde(default)]
    pub unmapped: Option<Unmapped>,
    #[serde(default)]
    pub io_in: Option<Hex>,
    /// Exceptions go through the guest's IVT or IDT.
    #[serde(default)]
    pub deliver: bool,
    #[serde(default)]
    pub stop: StopAt,
    #[serde(default = "a_million")]
    pub max_insns: u64,
    #[serde(default)]
    pub want: Option<Want>,
    /// In whose memory it runs.
    #[serde(default)]
    pub memory: Model,
    /// For people and for programs that keep cases: not looked at.
    #[serde(default, rename = "note")]
    pub _note: serde_json::Value,
}

/// What guest addresses mean.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Model {
    /// RAM of its own, behind page tables where the mode has them.
    #[default]
    Ram,
    /// A process's: the pages of `mem` at their addresses of the host process, as `bivisor run` has them.
    Flat,
}

fn a_million() -> u64 {
    1_000_000
}

/// Presets of control registers and segments.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum ModeName {
    Real16,
    Prot16,
    Prot32,
    Compat16,
    Compat32,
    #[default]
    Long64,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum SegmentValue {
    Whole { sel: Num, base: Option<Num>, limit: Option<Num>, attr: Option<Num> },
    Selector(Num),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableValue {
    pub base: Num,
    pub limit: Num,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct System {
    pub cr0: Option<Num>,
    pub cr2: Option<Num>,
    pub cr3: Option<Num>,
    pub cr4: Option<Num>,
    pub cr8: Option<Num>,
    pub efer: Option<Num>,
    pub xcr0: Option<Num>,
    pub gdtr: Option<TableValue>,
    pub idtr: Option<TableValue>,
    pub ldtr: Option<SegmentValue>,
    pub tr: Option<SegmentValue>,
    pub dr0: Option<Num>,
    pub dr1: Option<Num>,
    pub dr2: Option<Num>,
    pub dr3: Option<Num>,
    pub dr6: Option<Num>,
    pub dr7: Option<Num>,
    pub msrs: BTreeMap<String, Num>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Fpu {
    pub fcw: Option<Num>,
    pub fsw: Option<Num>,
    pub ftw_abridged: Option<Num>,
    pub fop: Option<Num>,
    pub fip: Option<Num>,
    pub fdp: Option<Num>,
    pub st: Vec<Wide>,
    pub mxcsr: Option<Num>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    pub addr: Num,
    #[serde(default)]
    pub hex: Option<Hex>,
    #[serde(default)]
    pub fill: Option<Hex>,
    #[serde(default)]
    pub len: Option<Num>,
    #[serde(default)]
    pub file: Option<String>,
    /// Of the pages that hold it; the last entry that says something about a page counts.
    #[serde(default)]
    pub rights: Option<Rights>,
}

/// Rights of pages: letters of `rwx` in this order, or `none`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights(pub Prot);

impl<'de> Deserialize<'de> for Rights {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Rights, D::Error> {
        let text = String::deserialize(d)?;
        let prot = match text.as_str() {
            "none" => Prot::empty(),
            "r" => Prot::READ,
            "rw" => Prot::READ | Prot::WRITE,
            "rx" => Prot::READ | Prot::EXEC,
            "rwx" => Prot::all(),
            _ => {
                return Err(serde::de::Error::custom(format!("rights `{text}` are none of r, rw, rx, rwx, none")));
            }
        };
        Ok(Rights(prot))
    }
}

/// What lies outside `mem`.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Unmapped {
    Ram,
    Fault,
}

/// When to stop, besides an exception and `max_insns`. HLT always stops.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StopAt {
    pub insns: Option<u64>,
    pub hlt: Option<bool>,
    pub rip: Option<Num>,
}

/// What the response holds.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Want {
    Names(Vec<String>),
    Ranges { mem: Vec<Range> },
    Both(Vec<WantItem>),
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum WantItem {
    Name(String),
    Ranges { mem: Vec<Range> },
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    pub addr: Num,
    pub len: Num,
}
