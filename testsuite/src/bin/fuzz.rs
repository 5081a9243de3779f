//! Fuzzes one target for a time: `fuzz TARGET SECONDS [SEED [FIRST]]`, from input FIRST on; an unknown target lists them. Status 1 if it found
//! something, 2 on wrong use. `fuzz seeds DIRECTORY` writes what cargo-fuzz begins with (`testsuite/fuzz`), a directory for each target.

use bivisor_testsuite::fuzz;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Writes the seeds, a file for each.
fn seeds(to: &Path) -> Result<(), String> {
    for (name, inputs) in fuzz::seeds()? {
        let dir = to.join(name);
        std::fs::create_dir_all(&dir).map_err(|e| e.to_string())?;
        for (n, input) in inputs.iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{n}")), input).map_err(|e| e.to_string())?;
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [command, to] = &args[..]
        && command == "seeds"
    {
        return match seeds(Path::new(to)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                eprintln!("{to}: {why}");
                ExitCode::from(1)
            }
        };
    }
    let number = |n: usize, default: u64| args.get(n).map_or(Ok(default), |a| a.parse());
    let (Some(name), Ok(seconds), Ok(seed), Ok(first)) = (args.first(), number(1, 1800), number(2, 0), number(3, 0))
    else {
        eprintln!("fuzz TARGET SECONDS [SEED [FIRST]]; targets: {}, and devices", fuzz::TARGETS.join(", "));
        return ExitCode::from(2);
    };
    // Beside this program lies the one that some targets run.
    let program = std::env::current_exe().unwrap_or_default().with_file_name("bivisor");
    let mut target = match fuzz::target(name, &program) {
        Ok(target) => target,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let start = Instant::now();
    let (n, findings) = fuzz::run(&mut *target, seed, first..u64::MAX, Duration::from_secs(seconds));
    println!(
        "{name}: {n} inputs of seed {seed} in {:.0} s, {} findings",
        start.elapsed().as_secs_f64(),
        findings.len()
    );
    findings.iter().for_each(|f| println!("{f}"));
    ExitCode::from(u8::from(!findings.is_empty()))
}
