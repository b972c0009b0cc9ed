fn main() {
    println!("gpu-handoff");
}
