//! The translator's persistent cache: a file for each program in a directory of the user's, read when the program starts and written when
//! it ends.
//!
//! What is in such a file is executed, so it is used only if nobody but the user can have written it: directory and file are the
//! user's, are no links, and cannot be written by group or others. A file is replaced as a whole by rename(2).

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::linux::{LastWords, Successor};
use bivisor_emulator::mem::{FlatSpace, Prot, Vma};
use bivisor_translator::lower::{adds_up, finds_by_pext};
use bivisor_translator::persist::{Archive, hash};
use bivisor_translator::{Cache, Policy};
use rustix::fs::{self, AtFlags, CWD, FileType, Mode, OFlags, Stat};
use rustix::process::{Resource, geteuid, getrlimit, getuid};
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// Bytes of all files together before the oldest are removed.
const MOST: u64 = 512 << 20;
const ENDING: &str = ".translations";

/// What tells a file, as it is now, from all others; and what it was written for.
#[derive(PartialEq, Eq)]
struct Book {
    file: (u64, u64, i64),
    written: (i64, u64),
    changed: (i64, u64),
    key: Vec<u8>,
}

/// What was read last: a child that was forked since need not read it again.
static SHELF: Mutex<Vec<(Book, Arc<Archive>)>> = Mutex::new(Vec::new());
const SHELVED: usize = 4;

/// Where the translations of one program are.
pub struct Place {
    directory: PathBuf,
    /// Device and inode of the directory.
    identity: (u64, u64),
    name: String,
    key: Vec<u8>,
}

/// The directory, unless it is named: `$XDG_CACHE_HOME/bivisor` or `$HOME/.cache/bivisor`.
///
/// # Errors
/// There is none.
fn standard() -> Result<PathBuf, String> {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
    variable("XDG_CACHE_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".cache")))
        .map(|p| p.join("bivisor"))
        .ok_or_else(|| "neither XDG_CACHE_HOME nor HOME is set".into())
}

/// Is it the user's alone to write?
fn is_ours(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind && stat.st_uid == geteuid().as_raw() && stat.st_mode & 0o022 == 0
}

/// Opens the directory.
fn open(directory: &Path) -> Result<(OwnedFd, Stat), String> {
    let shown = directory.display();
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY;
    let fd = fs::openat(CWD, directory, flags, Mode::empty()).map_err(|e| format!("{shown}: {e}"))?;
    let stat = fs::fstat(&fd).map_err(|e| format!("{shown}: {e}"))?;
    match is_ours(&stat, FileType::Directory) {
        true => Ok((fd, stat)),
        false => Err(format!("{shown} can be written by others, or is not yours")),
    }
}

impl Place {
    /// For a program and a CPU model, in `directory` or the standard one, which is made if it is not there.
    ///
    /// # Errors
    /// A sentence: why there is no cache.
    pub fn new(directory: Option<&Path>, program: &Path, model: &CpuModel) -> Result<Place, String> {
        if geteuid() != getuid() {
            return Err("bivisor runs with another user's rights".into());
        }
        let directory = directory.map_or_else(standard, |d| Ok(d.to_owned()))?;
        let (_, stat) = match open(&directory) {
            Ok(found) => found,
            Err(_) => {
                use std::os::unix::fs::DirBuilderExt;
                let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory);
                made.map_err(|e| format!("{}: {e}", directory.display()))?;
                open(&directory)?
            }
        };
        let this = std::fs::metadata("/proc/self/exe").map_err(|e| format!("/proc/self/exe: {e}"))?;
        // Another build of bivisor may translate otherwise.
        let key = format!(
            "bivisor {} of {} bytes, {}.{:09}; CPU {:016x}; PEXT {} {}; {:?}; {}",
            env!("CARGO_PKG_VERSION"),
            this.size(),
            this.mtime(),
            this.mtime_nsec(),
            model.fingerprint(),
            finds_by_pext(),
            adds_up(),
            Policy::default(),
            program.display(),
        );
        let program = program.file_name().unwrap_or_default().as_bytes();
        let safe = |b: &u8| if b.is_ascii_alphanumeric() || b"-_+.".contains(b) { char::from(*b) } else { '_' };
        let base: String = program.iter().take(64).map(safe).collect();
        let name = format!("{base}-{:016x}{ENDING}", hash::sum(key.as_bytes())[0]);
        Ok(Place { directory, identity: (stat.st_dev, stat.st_ino), name, key: key.into_bytes() })
    }

    /// The directory.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// What earlier runs have left; nothing if anything is odd.
    pub fn read(&self) -> Arc<Archive> {
        self.content().unwrap_or_default()
    }

    fn content(&self) -> Option<Arc<Archive>> {
        let (directory, _) = open(&self.directory).ok()?;
        let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::RDONLY;
        let fd = fs::openat(&directory, &*self.name, flags, Mode::empty()).ok()?;
        let s = fs::fstat(&fd).ok().filter(|s| is_ours(s, FileType::RegularFile))?;
        let (written, changed) = ((s.st_mtime, s.st_mtime_nsec as u64), (s.st_ctime, s.st_ctime_nsec as u64));
        let book = Book { file: (s.st_dev, s.st_ino, s.st_size), written, changed, key: self.key.clone() };
        // Another thread may have held it when this process was forked.
        let mut shelf = SHELF.try_lock();
        let known = |(other, archive): &(Book, Arc<Archive>)| (*other == book).then(|| archive.clone());
        if let Some(archive) = shelf.as_ref().ok().and_then(|shelf| shelf.iter().find_map(known)) {
            return Some(archive);
        }
        let mut bytes = Vec::with_capacity(s.st_size as usize + 1);
        File::from(fd).read_to_end(&mut bytes).ok()?;
        let archive = Arc::new(Archive::read(bytes, &self.key)?);
        if let Ok(shelf) = &mut shelf {
            shelf.truncate(SHELVED - 1);
            shelf.insert(0, (book, archive.clone()));
        }
        Some(archive)
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// A sentence.
    fn write(&self, bytes: &[u8]) -> Result<(), String> {
        // The program may have changed who it is, its root, or what it may write (SIGXFSZ would end it another way than it wants).
        let limit = getrlimit(Resource::Fsize).current;
        if limit.is_some_and(|most| most < bytes.len() as u64) {
            return Err("RLIMIT_FSIZE".into());
        }
        let (directory, stat) = open(&self.directory)?;
        if (stat.st_dev, stat.st_ino) != self.identity {
            return Err("it is another directory now".into());
        }
        make_room(&self.directory, bytes.len() as u64);
        let name = format!("{}.{}", self.name, std::process::id());
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::WRONLY;
        let fd = fs::openat(&directory, &*name, flags, Mode::RUSR | Mode::WUSR).map_err(|e| e.to_string())?;
        let mut file = File::from(fd);
        let done = file.write_all(bytes).map_err(|e| e.to_string());
        drop(file);
        let done =
            done.and_then(|()| fs::renameat(&directory, &*name, &directory, &*self.name).map_err(|e| e.to_string()));
        if done.is_err() {
            let _ = fs::unlinkat(&directory, &*name, AtFlags::empty());
        }
        done
    }
}

/// Removes the oldest files if all together are too many. Failure means that there is nothing to remove.
fn make_room(directory: &Path, more: u64) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let ours = entries.filter(|e| e.file_name().to_string_lossy().contains(ENDING));
    let mut files: Vec<_> = ours.filter_map(|e| e.metadata().ok().map(|m| (m.mtime(), m.size(), e.path()))).collect();
    files.sort();
    let mut total = more + files.iter().map(|(_, size, _)| size).sum::<u64>();
    for (_, size, path) in files {
        if total <= MOST {
            break;
        }
        let _ = std::fs::remove_file(path);
        total -= size;
    }
}

/// The way on to another program in the same host process, with a cache or without.
pub fn successor(directory: Option<PathBuf>, cache: &Arc<Cache>, model: &Arc<CpuModel>) -> Successor {
    let (cache, model) = (cache.clone(), model.clone());
    if let Some(directory) = directory.clone() {
        let model = model.clone();
        let read = move |program: &Path| Some(Place::new(Some(&directory), program, &model).ok()?.read());
        cache.set_librarian(Arc::new(read));
    }
    Successor(Some(Arc::new(move |program: &Path, old: &FlatSpace| {
        let cache = cache.current();
        let fixed =
            |v: &Vma| (v.backing.is_some() && !v.shared || &*v.name == "[vdso]") && !v.prot.contains(Prot::WRITE);
        let text: Vec<_> = old.all().into_iter().filter(fixed).map(|v| v.start..v.end).collect();
        cache.start_over(&text);
        let place = directory.as_deref().and_then(|d| Place::new(Some(d), program, &model).ok());
        let Some(place) = place else { return LastWords::default() };
        // Who has forked us may do so again.
        let (teller, program, process) = (cache.clone(), program.to_owned(), std::process::id());
        let tell = LastWords(Some(Arc::new(move || {
            if std::process::id() == process {
                teller.tell(&program);
            }
            String::new()
        })));
        remember(place, &cache, tell, false)
    })))
}

/// Uses what earlier runs have left, and sees to it that what is new is kept when the process ends.
pub fn remember(place: Place, cache: &Arc<Cache>, after: LastWords, verbose: bool) -> LastWords {
    cache.remember(place.read());
    let (cache, process) = (cache.clone(), std::process::id());
    LastWords(Some(Arc::new(move || {
        // A forked child has what its parent has, and little more.
        if std::process::id() == process
            && let Some(bytes) = cache.keep(&place.key)
            && let Err(why) = place.write(&bytes)
            && verbose
        {
            eprintln!("bivisor: translations are not kept: {why}");
        }
        after.0.as_ref().map_or_else(String::new, |words| words())
    })))
}
