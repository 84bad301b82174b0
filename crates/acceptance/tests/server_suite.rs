//! The server's own tests, with our engine as the default: the fast ones of those that `tests/server-tests.txt` lists.

use std::process::Command;

use acceptance::server::root;

/// The least that counts as a run.
const TESTS_MIN: usize = 200;

#[test]
fn the_servers_own_tests_pass_without_a_retry() {
    let output = Command::new(root().join("tools/server-tests"))
        .arg("fast")
        .current_dir(root())
        .output()
        .expect("tools/server-tests starts");
    let said =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let passed =
        said.lines().rev().find_map(|line| line.split_once(" passed,")?.0.parse::<usize>().ok()).unwrap_or(0);
    let end =
        said.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{end}");
    assert!(passed >= TESTS_MIN, "only {passed} tests ran\n{end}");
    eprintln!("{passed} of the server's own tests passed");
}
