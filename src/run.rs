//! `bivisor run`: a Linux program under an engine, with its exit status as ours.

use crate::beside::{self, Beside};
use crate::engine::{self, Backend};
use crate::image;
use crate::kept::{self, Place};
use crate::stats::{self, Format};
use anyhow::{Result, bail};
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::host::{fds, fork::exit_thread};
use bivisor_emulator::linux::{
    self, ExitStatus, Image, LastWords, LoadError, Options, Successor, Why, host, run, start,
};
use bivisor_translator::cache::DEFAULT_SIZE;
use clap::Args;
use clap::error::ErrorKind;
use std::ffi::{OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Arguments of `bivisor run`.
#[derive(Args)]
#[command(
    override_usage = "bivisor run [OPTIONS] [--] PROGRAM [ARGS]...",
    after_help = "Example:\n  bivisor run --backend interp /bin/ls -l /\n\n\
        Exit status: the program's own; if it dies of a signal, so does bivisor; 1 if it cannot be started."
)]
pub struct RunArgs {
    /// The engine.
    #[arg(long, value_enum, default_value = "auto")]
    backend: Backend,
    /// The offered CPU: host, max, x86-64-v1 to x86-64-v4.
    #[arg(long, value_name = "MODEL", default_value = "host")]
    cpu: String,
    /// Print each system call to standard error.
    #[arg(long)]
    strace: bool,
    /// When the program ends, print what the translator did; `--stats=json` for machines.
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    stats: Option<Format>,
    /// When the program ends, write the addresses of its translated blocks to /tmp/perf-PID.map for `perf report`, and with their code to
    /// /tmp/jit-PID.dump for `perf record -k mono` and `perf inject --jit`.
    #[arg(long)]
    perf: bool,
    /// The translator's memory for code; when it is full, all of it is thrown away. At least 128.
    #[arg(long, value_name = "KIB", value_parser = clap::value_parser!(u32).range(128..=1 << 20))]
    code_cache: Option<u32>,
    /// Do not keep translations for later runs, nor use those of earlier ones.
    #[arg(long)]
    no_cache: bool,
    /// Where translations are kept [default: bivisor in $XDG_CACHE_HOME or ~/.cache].
    #[arg(long, value_name = "DIR", conflicts_with = "no_cache")]
    cache_dir: Option<PathBuf>,
    /// Of the blocks that the translator's dispatcher enters have one in N run by the interpreter too; a difference becomes a file that
    /// `bivisor diff replay` shows, and the program goes on.
    #[arg(long, value_name = "1/N", value_parser = beside::one_in)]
    sentinel: Option<u64>,
    /// Where the sentinel's files go; default: the current directory.
    #[arg(long, value_name = "DIR", requires = "sentinel")]
    repro: Option<PathBuf>,
    /// Compare every stretch: for `bivisor diff`.
    #[arg(long, hide = true, value_name = "GRAIN:DIR", value_parser = Beside::parse, conflicts_with = "sentinel")]
    lockstep: Option<Beside>,
    /// Say which engine runs and why.
    #[arg(short, long)]
    verbose: bool,
    /// Set a variable of the program's environment; without =VALUE it is removed. May be repeated.
    #[arg(long, value_name = "NAME[=VALUE]")]
    env: Vec<OsString>,
    /// What the program sees as its own name (argument 0).
    #[arg(long, value_name = "NAME")]
    argv0: Option<OsString>,
    /// PROGRAM is a path even without a slash, as for execve(2).
    #[arg(long)]
    exact: bool,
    /// The program, looked up in PATH unless it has a slash, and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "PROGRAM")]
    command: Vec<OsString>,
}

impl RunArgs {
    /// Bytes for translated code.
    fn code_size(&self) -> usize {
        self.code_cache.map_or(DEFAULT_SIZE, |kib| kib as usize * 1024)
    }
}

/// Runs the program. Comes back only if it could not be started, or with its exit status.
pub fn run(args: &RunArgs) -> Result<i32> {
    if let Some(option) = args.command[0].to_str().filter(|s| !args.exact && s.starts_with('-')) {
        // What comes after the program is the program's, dashes and all; so an unknown option looks like a program.
        let error = clap::Error::raw(ErrorKind::UnknownArgument, format!("unexpected argument '{option}' found\n"));
        error.exit();
    }
    let model = match CpuModel::from_name(&args.cpu) {
        Ok(model) => Arc::new(model),
        Err(why) => bail!("{why}"),
    };
    let asked = match args.backend {
        Backend::Auto if args.sentinel.is_some() => Backend::Bt,
        asked => asked,
    };
    let chosen = engine::choose(asked, engine::Purpose::Process)
        .and_then(|(backend, why)| Ok((backend, why, engine::for_process(backend, &model, args.code_size())?)));
    let (backend, why, (mut factory, cache)) = match chosen {
        Ok(found) => found,
        Err(why) => bail!("{why}"),
    };
    if args.verbose {
        eprintln!("bivisor: {why}");
    }
    let mut last_words = match &cache {
        Some(cache) => stats::last_words(cache, args.stats, args.perf),
        None if args.stats.is_some() || args.perf => {
            bail!("--stats and --perf show what the translator does: use --backend bt")
        }
        None => LastWords::default(),
    };
    // Only then: a copy of standard error would keep a pipe open that the program closes.
    let log = (args.strace || args.stats.is_some() || args.sentinel.is_some())
        .then(|| std::io::stderr().as_fd().try_clone_to_owned().ok())
        .flatten()
        .map(fds::keep);
    if let Some(every) = args.sentinel {
        let Some(cache) = &cache else { bail!("--sentinel watches the translator: use --backend bt") };
        let dir = args.repro.as_deref().unwrap_or(Path::new("."));
        factory = beside::sentinel(cache, &model, every, dir, log)?;
    }
    if let Some(beside) = &args.lockstep {
        (factory, last_words) = beside::lockstep(backend, &model, beside)?;
    }
    let mut command = args.command.clone();
    let named = PathBuf::from(&command[0]);
    let path = if args.exact { Ok(PathBuf::from(&command[0])) } else { find(&command[0]) };
    let started = path.and_then(|path| {
        if let Some(name) = &args.argv0 {
            command[0].clone_from(name);
        }
        Image::open(&path, command)
    });
    let mut reexec = again(args, backend);
    let beside = args.lockstep.is_some() || args.sentinel.is_some();
    let mut directory = None;
    if let (Some(cache), Ok(image), false) = (&cache, &started, args.no_cache || beside) {
        match Place::new(args.cache_dir.as_deref(), &image.exe, &model) {
            Ok(place) => {
                // A program may change its environment.
                directory = Some(place.directory().to_owned());
                reexec.extend(["--cache-dir".into(), place.directory().into()]);
                last_words = kept::remember(place, cache, last_words, args.verbose);
            }
            Err(why) if args.verbose || args.cache_dir.is_some() => eprintln!("bivisor: no persistent cache: {why}"),
            Err(_) => {}
        }
    }
    // What is said of a program begins with it.
    let said = args.strace || args.stats.is_some() || args.perf || args.verbose;
    let successor = match (&cache, backend) {
        _ if said || beside => Successor::default(),
        (Some(cache), _) => kept::successor(directory, cache, &model),
        (None, Backend::Interp) => Successor(Some(Arc::new(|_, _| LastWords::default()))),
        _ => Successor::default(),
    };
    let options = Options { strace: args.strace, log, verbose: args.verbose, reexec, last_words, successor };
    let task = started.and_then(|image| start::start(image, environment(&args.env), options, &model, factory));
    let mut task = match task {
        Ok(task) => task,
        Err(error) => bail!("{error}{}", image::hint(&named)),
    };
    match run::run_task(&mut task) {
        // The other tasks of the process may go on.
        ExitStatus::Code(code) => {
            task.process.finish();
            exit_thread(code)
        }
        ExitStatus::Signal(sig) => {
            task.process.finish();
            host::die_of(sig)
        }
    }
}

/// The options that a program's exec passes on.
fn again(args: &RunArgs, backend: Backend) -> Vec<OsString> {
    let mut words = vec!["run", "--backend", backend.name(), "--cpu", &args.cpu];
    words.extend(args.strace.then_some("--strace"));
    words.extend(args.verbose.then_some("--verbose"));
    words.extend(args.perf.then_some("--perf"));
    words.extend(args.no_cache.then_some("--no-cache"));
    let stats = args.stats.map(|format| format!("--stats={}", format.name()));
    let code_cache = args.code_cache.map(|kib| vec!["--code-cache".into(), kib.to_string().into()]);
    let sentinel = args.sentinel.map(|every| vec!["--sentinel".into(), format!("1/{every}").into()]);
    let repro = args.repro.as_ref().map(|dir| vec!["--repro".into(), dir.clone().into_os_string()]);
    let lockstep = args.lockstep.as_ref().map(|b| vec!["--lockstep".into(), b.text().into()]);
    let more: Vec<Vec<OsString>> = [code_cache, sentinel, repro, lockstep].into_iter().flatten().collect();
    words.into_iter().map(OsString::from).chain(stats.map(OsString::from)).chain(more.concat()).collect()
}

fn environment(changes: &[OsString]) -> Vec<OsString> {
    let name = |s: &OsStr| s.as_bytes().split(|&c| c == b'=').next().unwrap_or_default().to_vec();
    let mut all = linux::exec::guest_environment(host::environment().into_iter());
    for change in changes {
        all.retain(|old| name(old) != name(change));
        if change.as_bytes().contains(&b'=') {
            all.push(change.clone());
        }
    }
    all
}

/// PATH lookup as a shell does it: a name with a slash is a path.
fn find(program: &OsStr) -> Result<PathBuf, LoadError> {
    let missing = || LoadError::new(Path::new(program), Why::NotFound);
    if program.as_bytes().contains(&b'/') {
        return Ok(PathBuf::from(program));
    }
    if program.is_empty() {
        return Err(missing());
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    let all: Vec<PathBuf> = std::env::split_paths(&path).map(|dir| dir.join(program)).filter(|p| p.is_file()).collect();
    let executable = all.iter().find(|p| host::may_execute(p));
    executable.or(all.first()).cloned().ok_or_else(missing)
}
