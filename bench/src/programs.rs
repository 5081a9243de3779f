//! The programs: C sources in `programs/` compiled here, and programs that the machine may have.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What to run.
pub enum Source {
    /// A source in `programs/`, with flags besides `-O2 -static`; its arguments, and those where an engine thirty to a hundred times
    /// slower needs a second or two.
    C {
        file: &'static str,
        flags: &'static [&'static str],
        large: &'static [&'static str],
        small: &'static [&'static str],
    },
    /// A command of the machine. `{c}` is a C file made for it, `{A|B}` A, or B for a slow engine.
    Installed(&'static [&'static str]),
}
use Source::{C, Installed};

/// A program, and what is asked of the translator with it.
pub struct Program {
    /// Its name on the command line and in the results.
    pub name: &'static str,
    /// What to run.
    pub source: Source,
    /// The translator's median must not be above this.
    pub target: Option<f64>,
    /// Most of its time goes into the kernel, which is far away on some hosts' KVM.
    pub system: bool,
}

const fn c(name: &'static str, target: f64, large: &'static [&'static str], small: &'static [&'static str]) -> Program {
    Program { name, source: C { file: name, flags: &[], large, small }, target: Some(target), system: false }
}

const fn system(
    name: &'static str,
    target: f64,
    large: &'static [&'static str],
    small: &'static [&'static str],
) -> Program {
    Program { system: true, ..c(name, target, large, small) }
}

const fn installed(name: &'static str, target: Option<f64>, command: &'static [&'static str]) -> Program {
    Program { name, source: Installed(command), target, system: false }
}

/// Recursion, a table, strings.
macro_rules! lua {
    ($fib:literal, $sums:literal, $strings:literal) => {
        concat!(
            "local function fib(n) if n<2 then return n end return fib(n-1)+fib(n-2) end local t={} for i=1,",
            $sums,
            " do t[i%1000+1]=(t[i%1000+1] or 0)+i end local s={} for i=1,",
            $strings,
            " do s[#s+1]=string.format('%d:%s',i,tostring(i*3)) end print(fib(",
            $fib,
            "),#table.concat(s),t[7])"
        )
    };
}
const LUA: &str = lua!("{33|30}", "{1000000|300000}", "{300000|100000}");
const LUAJIT: &str = lua!("{36|30}", "{3000000|300000}", "{1000000|100000}");
const NODE: &str = "const a=[];for(let i=0;i<200000;i++)a.push({k:'x'+i%997,v:i});\
const m=new Map();for(const e of a)m.set(e.k,(m.get(e.k)||0)+e.v);console.log(m.size,JSON.stringify([...m]).length)";
const PYTHON: &str = "d={}\nfor i in range({5000000|300000}): d[i%1000]=d.get(i%1000,0)+i*i\nprint(sum(d.values()))";
const SQL: &str = "with recursive n(i) as (select 1 union all select i+1 from n where i<{3000000|100000}) \
select sum(i*i%7), count(distinct i%1000) from n;";

/// All of them. A target is the slowdown that is asked for.
#[rustfmt::skip] // one program a line
pub const ALL: &[Program] = &[
    // Computation.
    c("core",        1.05, &["20000"],           &["400"]),
    c("records",     1.15, &["50000000"],        &["500000"]),
    c("sha256",      1.03, &["50"],              &["1"]),
    c("matrix",      1.03, &["300"],             &["3"]),
    Program { name: "matrix-avx2", system: false, target: Some(1.03),
        source: C { file: "matrix", flags: &["-mavx2", "-mfma"], large: &["300"], small: &["3"] } },
    c("memory",      1.00, &["4000000"],         &["400000"]),
    c("calls",       1.15, &["2000000"],         &["20000"]),
    c("fib",         1.15, &["41"],              &["30"]),
    c("goto",        1.20, &["600000000"],       &["10000000"]),
    installed("bzip2",          Some(1.05), &["bzip2", "-9", "-c", "{text}"]),
    installed("sqlite",         Some(1.25), &["sqlite3", ":memory:", SQL]),
    installed("python",         Some(1.30), &["/usr/bin/python3", "-c", PYTHON]),
    installed("lua",            Some(1.15), &["lua5.4", "-e", LUA]),
    // Much code that runs once, and code made at run time.
    installed("cc1",            Some(2.00), &["{cc1}", "-O2", "-quiet", "{c}", "-o", "/dev/null"]),
    installed("node",           Some(2.00), &["node", "-e", NODE]),
    installed("luajit",         Some(1.20), &["luajit", "-e", LUAJIT]),
    installed("luajit-interp",  None,       &["luajit", "-joff", "-e", LUA]),
    Program { name: "smc-10",   target: Some(5.0), source: C { file: "smc", flags: &[], large: &["10", "200000"], small: &["10", "10000"] }, system: false },
    Program { name: "smc-1000", target: Some(5.0), source: C { file: "smc", flags: &[], large: &["1000", "200000"], small: &["1000", "1000"] }, system: false },
    // The system.
    system("getppid",     1.50, &["2000000"],         &["100000"]),
    system("signals",     2.00, &["200000"],          &["50000"]),
    system("pingpong",    1.20, &["20000"],           &["5000"]),
    system("forkexec",    3.00, &["200"],             &["50"]),
    Program { name: "hello",    target: None, source: C { file: "hello", flags: &[], large: &[], small: &[] }, system: false },
    installed("true",           None,       &["/bin/true"]),
];

/// The command of a program, made ready in `build`. An error says why the machine cannot run it.
pub fn command(program: &Program, slow: bool, build: &Path) -> Result<Vec<String>> {
    match &program.source {
        C { file, flags, large, small } => {
            let binary = build.join(program.name);
            if !binary.exists() {
                compile(file, flags, &binary)?;
            }
            let arguments = if slow { small } else { large };
            Ok(std::iter::once(text(&binary)?).chain(arguments.iter().map(|a| a.to_string())).collect())
        }
        Installed(words) => {
            let mut command = Vec::new();
            for word in *words {
                command.push(match *word {
                    "{c}" => text(&large_source(build)?)?,
                    "{text}" => text(&large_text(build)?)?,
                    "{cc1}" => cc1()?,
                    _ => sized(word, slow),
                });
            }
            command[0] = text(&which(&command[0]).with_context(|| format!("{} is not installed", command[0]))?)?;
            Ok(command)
        }
    }
}

/// `{A|B}` chosen.
fn sized(word: &str, slow: bool) -> String {
    let mut out = String::new();
    for piece in word.split_inclusive('}') {
        let numbers = piece.rsplit_once('{').and_then(|(text, n)| Some((text, n.strip_suffix('}')?.split_once('|')?)));
        match numbers {
            Some((text, (fast, small))) => out.extend([text, if slow { small } else { fast }]),
            None => out.push_str(piece),
        }
    }
    out
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).context("a path that is not UTF-8")
}

fn compile(file: &str, flags: &[&str], binary: &Path) -> Result<()> {
    for flag in flags {
        let feature = flag.trim_start_matches("-m");
        if !std::fs::read_to_string("/proc/cpuinfo")?.split_whitespace().any(|f| f == feature) {
            bail!("this CPU has no {feature}");
        }
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("programs").join(format!("{file}.c"));
    let cc = Command::new("cc")
        .args(["-O2", "-static"])
        .args(flags)
        .arg("-o")
        .arg(binary)
        .arg(&source)
        .status()
        .context("cc")?;
    if !cc.success() {
        bail!("cc could not compile {}", source.display());
    }
    Ok(())
}

/// A file of several hundred functions for the compiler to work on.
fn large_source(build: &Path) -> Result<PathBuf> {
    use std::fmt::Write;
    let path = build.join("large.c");
    let mut s = String::from("struct s { struct s *next; int a[8]; double d; };\nint g(int), h(int, struct s *);\n");
    for i in 0..250 {
        write!(
            s,
            "int f{i}(struct s *p, int n) {{\n  int t = {i};\n  for (int i = 0; i < n; i++) {{\n    if (p->a[i & 7] > t) t += g(i ^ {i}); else p = p->next;\n    \
             switch (t % {}) {{ case 0: t++; break; case 1: t *= 3; break; case 2: p->d += t; break; default: t ^= h(i, p); }}\n    p->a[t & 7] = i * {i};\n  }}\n  \
             return t + (int)p->d;\n}}\n",
            i % 7 + 4
        )?;
    }
    std::fs::write(&path, s)?;
    Ok(path)
}

/// Eight megabytes of text that is neither random nor dull.
fn large_text(build: &Path) -> Result<PathBuf> {
    use std::fmt::Write;
    let path = build.join("large.txt");
    let mut s = String::new();
    let mut x = 1u64;
    while s.len() < 8 << 20 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        writeln!(s, "{:x} and {} of {}", x >> 40, x >> 50, s.len() / 77)?;
    }
    std::fs::write(&path, s)?;
    Ok(path)
}

fn cc1() -> Result<String> {
    let out = Command::new("gcc").arg("-print-prog-name=cc1").output().context("gcc is not installed")?;
    let path = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    if !path.starts_with('/') {
        bail!("gcc names no cc1");
    }
    Ok(path)
}

fn which(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Path::new(program).is_file().then(|| program.into());
    }
    std::env::split_paths(&std::env::var_os("PATH")?).map(|d| d.join(program)).find(|f| f.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_chosen_and_other_braces_stay() {
        assert_eq!(sized("d={} for i in {5|3}: d{}", false), "d={} for i in 5: d{}");
        assert_eq!(sized("d={} for i in {5|3}: d{}", true), "d={} for i in 3: d{}");
        assert_eq!(sized(LUA, true), lua!("30", "300000", "100000"));
    }
}
