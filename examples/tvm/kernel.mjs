// One linear layer, y = W x, in WebAssembly, with no runtime:   node kernel.mjs KERNEL.wasm FOLDER
// FOLDER is what make_kernel.py wrote. Reads rows of K float32 from standard input, writes rows of N. A page does the same
// with fetch in place of readFileSync.
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [, , file, folder] = process.argv;
const { K, N, BASES, TILES, WORDS, GROUPS, SCALE_BITS } = JSON.parse(readFileSync(join(folder, "layer.json")));
let memory;  // set below: the kernel's own
const text = (at) => { const bytes = new Uint8Array(memory.buffer, at); return new TextDecoder().decode(bytes.slice(0, bytes.indexOf(0))); };
const env = {  // the one function that a kernel takes from outside: its checks of the arguments call it
  TVMFFIErrorSetRaisedFromCStrParts(kind, parts, count) {
    const pointers = new Uint32Array(memory.buffer, parts, count);
    throw new Error(`${text(kind)}: ${[...pointers].filter(Boolean).map(text).join("")}`);
  },
};
const { instance } = await WebAssembly.instantiate(readFileSync(file), { env });
memory = instance.exports.memory;

let end = instance.exports.__heap_base.value;
function take(size) {  // bytes at a multiple of 64, which TVM's code counts on
  const at = Math.ceil(end / 64) * 64;
  end = at + size;
  if (end > memory.buffer.byteLength) memory.grow(Math.ceil((end - memory.buffer.byteLength) / 65536));
  return at;
}
function tensor(code, bits, shape, bytes) {  // a DLTensor of 32-bit pointers; code: 0 signed, 1 unsigned, 2 float
  const size = (shape.reduce((a, b) => a * b) * bits) / 8;
  const data = take(size), dims = take(8 * shape.length), at = take(40);
  if (bytes) new Uint8Array(memory.buffer, data, size).set(bytes);
  new BigInt64Array(memory.buffer, dims, shape.length).set(shape.map(BigInt));
  const type = code | (bits << 8) | (1 << 16), cpu = 1;
  new Int32Array(memory.buffer, at, 10).set([data, cpu, 0, shape.length, type, dims, 0, 0, 0, 0]);
  return { data, at };
}
const constant = (name, code, bits, ...shape) => tensor(code, bits, shape, readFileSync(join(folder, `${name}.bin`)));
const x = tensor(2, 32, [1, K]), y = tensor(2, 32, [1, N]);
const parameters = [
  x, constant("planes", 1, 32, BASES, TILES, WORDS, 16), constant("scales", 2, SCALE_BITS, BASES, TILES, GROUPS, 16),
  constant("offset", 2, 32, TILES, GROUPS, 16), constant("bias", 2, 32, TILES, 16), y,
];
const values = take(16 * parameters.length), result = take(16);
const kDLTensor = 7;  // a value is its type, padding, and 8 bytes
parameters.forEach((p, i) => new Int32Array(memory.buffer, values + 16 * i, 4).set([kDLTensor, 0, p.at, 0]));

const input = readFileSync(0), rows = input.length / (4 * K), output = Buffer.alloc(rows * 4 * N);
for (let row = 0; row < rows; ++row) {
  new Uint8Array(memory.buffer, x.data, 4 * K).set(input.subarray(4 * K * row, 4 * K * (row + 1)));
  if (instance.exports.__tvm_ffi_binary_basis_matmul(0, values, parameters.length, result)) throw new Error("failed");
  output.set(new Uint8Array(memory.buffer, y.data, 4 * N), 4 * N * row);
}
writeFileSync(1, output);
