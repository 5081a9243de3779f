//! `--drive` and its kin: a disk in the words of QEMU's option of that name.

use anyhow::{Result, anyhow, bail};
use bivisor_emulator::devices::disk::{Disk, Format, Options};
use bivisor_emulator::devices::ide::Kind;
use bivisor_emulator::machine::IdeDrive;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What a drive is connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interface {
    /// A virtio block device on PCI.
    Virtio,
    /// The IDE controller.
    Ide,
}

/// A drive as the command line says it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Drive {
    /// The image.
    pub file: PathBuf,
    format: Option<Format>,
    read_only: bool,
    snapshot: bool,
    no_flush: bool,
    /// Where it is connected.
    pub interface: Interface,
    /// It is a CD.
    pub cdrom: bool,
}

/// All drives of a machine, open.
#[derive(Debug, Default)]
pub struct Drives {
    /// Those on virtio, in the order of the command line.
    pub virtio: Vec<Arc<Mutex<Disk>>>,
    /// First and second of the first IDE channel, then of the second.
    pub ide: [Option<IdeDrive>; 4],
}

impl Drives {
    /// Opens them; the CD of `--cdrom` comes on the second IDE channel if it is free, as PCs have it.
    ///
    /// # Errors
    /// One line: option, file, and what is wrong with it, or that there are too many.
    pub fn open(drives: &[Drive], cdrom: Option<&Path>) -> Result<Drives> {
        let mut all = Drives::default();
        for drive in drives {
            let disk = drive.open("--drive")?;
            match drive.interface {
                Interface::Virtio => all.virtio.push(disk),
                Interface::Ide => all.connect(if drive.cdrom { Kind::Cd } else { Kind::Disk }, disk, 0)?,
            }
        }
        if let Some(path) = cdrom {
            all.connect(Kind::Cd, Drive::cdrom(path.to_owned()).open("--cdrom")?, 2)?;
        }
        Ok(all)
    }

    fn connect(&mut self, kind: Kind, disk: Arc<Mutex<Disk>>, best: usize) -> Result<()> {
        let free = (best..4).chain(0..best).find(|n| self.ide[*n].is_none());
        let place = free.ok_or_else(|| anyhow!("IDE has room for four drives"))?;
        self.ide[place] = Some((kind, disk));
        Ok(())
    }
}

const WORDS: &str = "file=PATH[,format=raw|qcow2][,if=virtio|ide][,media=disk|cdrom][,readonly=on|off][,snapshot=on|off]\
                     [,cache=writeback|unsafe]";

/// Parts between commas; two commas are one that belongs to the text.
fn parts(text: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            ',' if chars.next_if_eq(&',').is_none() => out.push(String::new()),
            c => out.last_mut().expect("never empty").push(c),
        }
    }
    out
}

fn switch(key: &str, value: &str) -> Result<bool, String> {
    match value {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err(format!("{key}={value}: on or off")),
    }
}

impl Drive {
    /// A CD in the drive of `--cdrom`.
    fn cdrom(file: PathBuf) -> Drive {
        Drive {
            file,
            format: Some(Format::Raw),
            read_only: true,
            snapshot: false,
            no_flush: false,
            interface: Interface::Ide,
            cdrom: true,
        }
    }

    /// Parses the option; a CD is read-only and on IDE if nothing else is said.
    ///
    /// # Errors
    /// A sentence that names the words.
    pub fn parse(text: &str) -> Result<Drive, String> {
        let mut file = None;
        let mut interface = None;
        let mut drive = Drive { cdrom: false, read_only: false, format: None, ..Drive::cdrom(PathBuf::new()) };
        for part in parts(text) {
            let (key, value) = part.split_once('=').ok_or_else(|| format!("`{part}`: {WORDS}"))?;
            match (key, value) {
                ("file", "") => return Err("file= names no file".into()),
                ("file", path) => file = Some(PathBuf::from(path)),
                ("format", "raw") => drive.format = Some(Format::Raw),
                ("format", "qcow2") => drive.format = Some(Format::Qcow2),
                ("if", "virtio") => interface = Some(Interface::Virtio),
                ("if", "ide") => interface = Some(Interface::Ide),
                ("media", "disk") => drive.cdrom = false,
                ("media", "cdrom") => drive.cdrom = true,
                ("readonly" | "read-only", v) => drive.read_only = switch(key, v)?,
                ("snapshot", v) => drive.snapshot = switch(key, v)?,
                ("cache", "writeback" | "writethrough" | "none" | "directsync") => drive.no_flush = false,
                ("cache", "unsafe") => drive.no_flush = true,
                ("format", v) => return Err(format!("format={v}: raw or qcow2")),
                ("if", v) => return Err(format!("if={v}: virtio or ide")),
                _ => return Err(format!("`{part}`: {WORDS}")),
            }
        }
        drive.file = file.ok_or_else(|| format!("names no file: {WORDS}"))?;
        drive.read_only |= drive.cdrom;
        drive.interface = interface.unwrap_or(if drive.cdrom { Interface::Ide } else { Interface::Virtio });
        Ok(drive)
    }

    /// Opens the image.
    ///
    /// # Errors
    /// One line: option, file, and what is wrong with it.
    pub fn open(&self, option: &str) -> Result<Arc<Mutex<Disk>>> {
        let options = Options {
            format: self.format,
            read_only: self.read_only,
            snapshot: self.snapshot && !self.read_only,
            no_flush: self.no_flush,
        };
        let disk = Disk::open(&self.file, options);
        let disk = disk.map_err(|why| anyhow!("{option} {}: {why}", self.file.display()))?;
        if self.cdrom && disk.size() > 1 << 41 {
            bail!("{option} {}: larger than a CD can be", self.file.display());
        }
        Ok(Arc::new(Mutex::new(disk)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemus_words() {
        let d = Drive::parse("file=a,,b.img,format=raw,if=ide,readonly=on").expect("parses");
        assert_eq!((d.file.to_str(), d.format, d.interface), (Some("a,b.img"), Some(Format::Raw), Interface::Ide));
        assert!(d.read_only && !d.cdrom && !d.snapshot);
        let d = Drive::parse("file=x").expect("parses");
        assert_eq!((d.format, d.interface, d.read_only), (None, Interface::Virtio, false));
        let d = Drive::parse("media=cdrom,file=x.iso").expect("parses");
        assert!(d.cdrom && d.read_only && d.interface == Interface::Ide);
        for (text, word) in [
            ("x", "`x`"),
            ("format=raw", "no file"),
            ("file=x,if=scsi", "virtio or ide"),
            ("file=x,readonly", "readonly"),
            ("file=x,snapshot=yes", "on or off"),
            ("file=", "no file"),
            ("file=x,", "``"),
        ] {
            assert!(Drive::parse(text).expect_err(text).contains(word), "{text}");
        }
    }
}
