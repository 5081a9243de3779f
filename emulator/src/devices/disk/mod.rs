//! What is behind a disk of the guest: a file of the host, raw or qcow2, read and written by byte offsets.

mod counts;
mod overlay;
mod qcow2;

use overlay::Overlay;
use qcow2::Qcow2;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind, Result as IoResult, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Bytes of a sector: the unit of a disk's size, not of an access.
pub const SECTOR: u64 = 512;

/// How bytes lie in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Raw,
    /// QEMU's, versions 2 and 3.
    Qcow2,
}

/// How to open an image.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// `None`: qcow2 if the file begins as one, else raw, and then the guest cannot make it begin as a qcow2.
    pub format: Option<Format>,
    /// The guest cannot write.
    pub read_only: bool,
    /// What the guest writes is kept in memory and lost at the end.
    pub snapshot: bool,
    /// What the guest flushes need not reach the host's disk before it goes on.
    pub no_flush: bool,
}

/// An open image.
#[derive(Debug)]
pub struct Disk {
    image: Image,
    size: u64,
    read_only: bool,
    no_flush: bool,
    /// The format was guessed: nothing that begins as a qcow2 may be written to the first sector.
    guessed: bool,
    overlay: Option<Overlay>,
}

#[derive(Debug)]
enum Image {
    Raw(File),
    Qcow2(Qcow2),
}

impl Image {
    fn read(&mut self, at: u64, to: &mut [u8]) -> IoResult<()> {
        match self {
            Image::Raw(file) => read_padded(file, at, to),
            Image::Qcow2(image) => image.read(at, to),
        }
    }

    fn write(&mut self, at: u64, from: &[u8]) -> IoResult<()> {
        match self {
            Image::Raw(file) => file.write_all_at(from, at),
            Image::Qcow2(image) => image.write(at, from),
        }
    }
}

/// Reads what the file has; beyond its end are zeros.
fn read_padded(file: &File, mut at: u64, mut to: &mut [u8]) -> IoResult<()> {
    while !to.is_empty() {
        match file.read_at(to, at) {
            Ok(0) => {
                to.fill(0);
                return Ok(());
            }
            Ok(n) => {
                to = &mut to[n..];
                at += n as u64;
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Opens and locks a file, as other virtual machines' programs do not; gives its length too.
fn open_file(path: &Path, write: bool) -> Result<(File, u64), String> {
    let mut file = OpenOptions::new().read(true).write(write).open(path).map_err(|e| match e.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem if write => {
            format!("{e}; add readonly=on if the guest need not write")
        }
        _ => e.to_string(),
    })?;
    if file.metadata().map_err(|e| e.to_string())?.is_dir() {
        return Err("is a directory".into());
    }
    match if write { file.try_lock() } else { file.try_lock_shared() } {
        Err(TryLockError::WouldBlock) if write => return Err("is in use as a disk already".into()),
        Err(TryLockError::WouldBlock) => return Err("is in use as a disk that is written to".into()),
        // A file system without locks.
        Ok(()) | Err(TryLockError::Error(_)) => {}
    }
    let size = file.seek(SeekFrom::End(0)).map_err(|e| e.to_string())?;
    Ok((file, size))
}

/// Does the image begin as a qcow2?
fn is_qcow2(file: &File) -> bool {
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0).is_ok() && magic == qcow2::MAGIC
}

#[cfg(test)]
impl Disk {
    /// From now on the host refuses: a raw image's file becomes one that is open for writing only, or for reading only. Gives what it was.
    pub fn fail(&mut self, reads: bool) -> File {
        let refuses = OpenOptions::new().read(!reads).write(reads).open("/dev/null").expect("every host has it");
        self.mend(refuses)
    }

    /// Puts a raw image's file back.
    pub fn mend(&mut self, file: File) -> File {
        match &mut self.image {
            Image::Raw(now) => std::mem::replace(now, file),
            Image::Qcow2(_) => panic!("a raw image"),
        }
    }
}

impl Disk {
    /// Opens an image file.
    ///
    /// # Errors
    /// A sentence: the file cannot be read, written or locked, is in use, empty, no image of the format, damaged, or wants what is not
    /// built.
    pub fn open(path: &Path, options: Options) -> Result<Disk, String> {
        Disk::open_backed(path, options, 0)
    }

    /// As [`Disk::open`], behind `depth` images that are backed by each other.
    fn open_backed(path: &Path, options: Options, depth: u32) -> Result<Disk, String> {
        let write = !options.read_only && !options.snapshot;
        let (file, length) = open_file(path, write)?;
        let format = options.format.unwrap_or(if is_qcow2(&file) { Format::Qcow2 } else { Format::Raw });
        let (image, size) = match format {
            Format::Raw if length == 0 => return Err("is empty".into()),
            Format::Raw => (Image::Raw(file), length),
            Format::Qcow2 => {
                let image = Qcow2::open(file, length, path, depth, write)?;
                let size = image.size();
                (Image::Qcow2(image), size)
            }
        };
        // As every disk has whole sectors; the rest of the last one is zeros.
        let size = size.checked_next_multiple_of(SECTOR).ok_or("is too large")?;
        Ok(Disk {
            image,
            size,
            read_only: options.read_only,
            no_flush: options.no_flush,
            guessed: options.format.is_none() && format == Format::Raw,
            overlay: options.snapshot.then(Overlay::default),
        })
    }

    /// Bytes, a multiple of [`SECTOR`].
    pub fn size(&self) -> u64 {
        self.size
    }

    /// May the guest not write?
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn check(&self, at: u64, len: usize) -> IoResult<()> {
        let inside = at.checked_add(len as u64).is_some_and(|end| end <= self.size);
        if inside { Ok(()) } else { Err(Error::new(ErrorKind::InvalidInput, "beyond the end of the disk")) }
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// Beyond the end, the host's, or the image is damaged there.
    pub fn read(&mut self, at: u64, to: &mut [u8]) -> IoResult<()> {
        self.check(at, to.len())?;
        match &self.overlay {
            Some(overlay) => overlay.read(at, to, |at, to| self.image.read(at, to)),
            None => self.image.read(at, to),
        }
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// Beyond the end, read-only, the host's, or what would turn a raw image whose format was guessed into another one.
    pub fn write(&mut self, at: u64, from: &[u8]) -> IoResult<()> {
        self.check(at, from.len())?;
        if self.read_only {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        }
        if let Some(overlay) = &mut self.overlay {
            return overlay.write(at, from, |at, to| self.image.read(at, to));
        }
        if self.guessed && at < 4 && !from.is_empty() {
            let mut magic = [0; 4];
            self.image.read(0, &mut magic)?;
            magic.iter_mut().skip(at as usize).zip(from).for_each(|(m, b)| *m = *b);
            if magic == qcow2::MAGIC {
                let why = "the guest writes a qcow2 header to a disk that was not said to be raw (format=raw)";
                return Err(Error::new(ErrorKind::PermissionDenied, why));
            }
        }
        self.image.write(at, from)
    }

    /// What was written so far reaches the host's disk.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&mut self) -> IoResult<()> {
        if self.overlay.is_some() || self.read_only || self.no_flush {
            return Ok(());
        }
        match &self.image {
            Image::Raw(file) => file.sync_data(),
            Image::Qcow2(image) => image.flush(),
        }
    }
}

#[cfg(test)]
mod tests;
